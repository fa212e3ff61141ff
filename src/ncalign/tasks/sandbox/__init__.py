"""A sandbox for a model's programs."""

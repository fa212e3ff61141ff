"""A model that gives log-probs of completions, ``[B, K]``."""

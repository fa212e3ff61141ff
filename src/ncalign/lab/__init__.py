"""The theory checked on policies small enough to enumerate: no sampling noise, no model, no data."""

"""`ncalign adjust`: new rewards computed from existing ones."""

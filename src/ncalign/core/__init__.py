"""Small things that many rooms use; they know nobody."""

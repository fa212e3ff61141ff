"""Groups of scored candidates: text in, text out."""

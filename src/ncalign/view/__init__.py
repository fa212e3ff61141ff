"""`ncalign view`: a browser for groups of candidates."""

"""`ncalign adjust`: rewards made anew from rewards."""

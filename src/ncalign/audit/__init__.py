"""`ncalign check` and `ncalign audit`: what a data set is like before anything is trained on it."""

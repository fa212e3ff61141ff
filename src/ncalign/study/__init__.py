"""`ncalign study`: arms × seeds of ordinary runs, compared with intervals; and a tiny model to run them on."""

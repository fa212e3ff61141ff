"""For a process that runs `ncalign online`: vLLM's weight transfer is a stand-in."""

from transfer_double import put_in_place

put_in_place()

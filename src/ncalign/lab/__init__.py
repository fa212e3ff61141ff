"""The theory checked on policies small enough to enumerate: no sampling noise, no model, no data."""

from ncalign.lab.run import run_lab

__all__ = ["run_lab"]

"""A sandbox for a model's programs."""

from ncalign.tasks.sandbox.run import Status, isolation, run_sandboxed

__all__ = ["Status", "isolation", "run_sandboxed"]

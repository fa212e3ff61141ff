"""Training: groups in, a run folder out."""

from ncalign.training.dry_run import dry_run
from ncalign.training.train import run_training

__all__ = ["dry_run", "run_training"]

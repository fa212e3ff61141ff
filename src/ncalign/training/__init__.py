"""Training: groups in, a run folder out."""

from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.training.plan import dry_run
    from ncalign.training.train import run_training

__all__ = ["dry_run", "run_training"]

__getattr__ = importer(__name__, {"dry_run": "ncalign.training.plan", "run_training": "ncalign.training.train"})

"""Training: groups in, a run folder out."""

from ncalign.core.lazy import importer

__getattr__ = importer(
    __name__,
    plan="dry_run",
    train="run_training",
)

"""`ncalign check` and `ncalign audit`: what a data set is like before anything is trained on it."""

from ncalign.core.lazy import importer

__getattr__ = importer(
    __name__,
    findings="Finding",
    measures="GroupMeasures measure_group",
    audit="run_audit",
)

"""`ncalign audit`: what a set of scored candidates is like, before anything is trained on it."""

from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.audit.audit import run_audit
    from ncalign.audit.findings import Finding, findings
    from ncalign.audit.measures import GroupMeasures, measure_group

__all__ = [
    "Finding",
    "GroupMeasures",
    "findings",
    "measure_group",
    "run_audit",
]

__getattr__ = importer(
    __name__,
    {
        "Finding": "ncalign.audit.findings",
        "GroupMeasures": "ncalign.audit.measures",
        "findings": "ncalign.audit.findings",
        "measure_group": "ncalign.audit.measures",
        "run_audit": "ncalign.audit.audit",
    },
)

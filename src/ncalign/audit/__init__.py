"""`ncalign audit`: what a set of scored candidates is like, before anything is trained on it."""

from ncalign.audit.findings import Finding, findings
from ncalign.audit.measures import GroupMeasures, measure_group
from ncalign.audit.run import run_audit

__all__ = ["Finding", "GroupMeasures", "findings", "measure_group", "run_audit"]

"""Pages made from a run folder."""

from ncalign.report.page import write_report
from ncalign.report.rounds import write_rounds_report

__all__ = ["write_report", "write_rounds_report"]

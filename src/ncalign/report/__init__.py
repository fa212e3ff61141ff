"""Pages made from a run folder."""

from ncalign.report.online_page import write_rounds_report
from ncalign.report.page import write_report

__all__ = ["write_report", "write_rounds_report"]

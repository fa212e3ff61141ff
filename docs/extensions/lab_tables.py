"""Writes the tables of docs/lab.md from a run of the laboratory: ``python docs/extensions/lab_tables.py``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ncalign.core.atomic import write_text_atomic
from ncalign.lab.report import verdict
from ncalign.lab.results import Findings, Statement
from ncalign.lab.theory import EXPERIMENTS

PAGE = Path(__file__).resolve().parents[1] / "lab.md"
HEADER = "| Statement | Source | Predicted | Measured | Tolerance | Result |\n|---|---|---|---|---|---|"
TABLE = re.compile(r"^\| Statement \|.*(?:\n\|.*)*", re.MULTILINE)
COUNT = re.compile(r"^The \d+ rows", re.MULTILINE)


def number(value: float) -> str:
    """A number as the tables show it; rounding errors with one digit."""
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-9 else f"{value:.0e}".replace("e-0", "e-")


def row(statement: Statement) -> str:
    """A statement as a row of its table."""
    words = statement.statement.replace("|", "\\|")
    numbers = (number(value) for value in (statement.predicted, statement.measured, statement.tolerance))
    return f"| {' | '.join((words, statement.source, *numbers, verdict(statement)))} |"


def filled(page: str, found: Sequence[Findings]) -> str:
    """The page with one table for each experiment, in their order, and with the number of all rows.

    Raises:
        ValueError: The page has more or fewer tables than there are experiments.
    """
    tables = iter(["\n".join([HEADER, *map(row, findings.statements)]) for findings in found])
    places = len(TABLE.findall(page))
    if places != len(found):
        raise ValueError(
            f"{PAGE.name} has {places} tables of statements and there are {len(found)} experiments: one is missing"
        )
    written = TABLE.sub(lambda _: next(tables), page)
    return COUNT.sub(f"The {sum(len(findings.statements) for findings in found)} rows", written)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    text = filled(PAGE.read_text(encoding="utf-8"), [experiment() for experiment in EXPERIMENTS])
    write_text_atomic(text, path)
    print(path)

"""One table, shown in a terminal, as JSON, as CSV and as LaTeX."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ncalign.core.atomic import write_text_atomic
from ncalign.core.json import json_ready
from ncalign.core.terminal import visible

Cell = str | int | float | None

MISSING = "–"
_TERMINAL_WIDTH = 120
_WHOLE = 40
# Also the full-width signs, and behind white space, which some spreadsheets drop.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_COMMANDS = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar", '"': "quotedbl"}
_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "{}$&#%_"}
    | {character: rf"\text{name}{{}}" for character, name in _COMMANDS.items()}
    | {MISSING: "--", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)


@dataclass(frozen=True)
class Column:
    """A column's name, and how many digits its fractions are shown with."""

    name: str
    digits: int = 2


def columns(*names: str, digits: int = 2) -> tuple[Column, ...]:
    """Columns whose fractions are shown with the same number of digits."""
    return tuple(Column(name, digits) for name in names)


@dataclass(frozen=True)
class ShownCell:
    """A cell of a page.

    Attributes:
        shown: its text.
        value: its number, where it is one.
        is_text: whether its column holds text.
        reason: why it is missing, where that is known.
    """

    shown: str
    value: int | float | None
    is_text: bool
    reason: str

    @property
    def is_number(self) -> bool:
        """Whether it is a number."""
        return self.value is not None


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; None and NaN are missing.

    Attributes:
        columns: with different names.
        rows: a cell for each column.
        caption: a sentence about it; may be empty.
        reasons: why a cell is missing, by the row's first cell and the column's name; an empty one stands for all rows or all
            columns that have no reason of their own.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that rows and columns fit."""
        names = [column.name for column in self.columns]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two columns are named {doubled[0]!r}; a column's name is its key in JSON")
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells; there are {len(self.columns)} columns")

    def is_text(self, place: int) -> bool:
        """Whether a column holds text, which stands to the left; numbers stand to the right."""
        return any(isinstance(row[place], str) for row in self.rows)

    def shown_rows(self) -> list[list[str]]:
        """The cells as a terminal and LaTeX show them."""
        return [[cell.shown for cell in row] for row in self.cells()]

    def cells(self) -> list[list[ShownCell]]:
        """The cells as pages show them: a missing one with its reason."""
        return [[self._cell(row, place, column) for place, column in enumerate(self.columns)] for row in self.rows]

    def _cell(self, row: Sequence[Cell], place: int, column: Column) -> ShownCell:
        value = json_ready(row[place])
        number = value if isinstance(value, int | float) else None
        reason = self._reason(row, column.name) if value is None or value == MISSING else ""
        return ShownCell(_shown(value, column.digits), number, self.is_text(place), reason)

    def _reason(self, row: Sequence[Cell], column: str) -> str:
        keys = ((str(row[0]), column), ("", column), (str(row[0]), ""), ("", ""))
        return next((self.reasons[key] for key in keys if key in self.reasons), "")

    def reason_lines(self) -> list[str]:
        """Why cells are missing, a line for each reason, with the rows and columns that it is the reason of.

        >>> heads = columns("model", "low", "high")
        >>> Table(heads, (("new", None, None),), reasons={("new", ""): "one question has no interval"}).reason_lines()
        ['– (new: low, high): one question has no interval']
        """
        places: dict[str, dict[str, list[str]]] = {}
        for row, cells in zip(self.rows, self.cells(), strict=True):
            for column, cell in zip(self.columns, cells, strict=True):
                if cell.reason:
                    places.setdefault(cell.reason, {}).setdefault(str(row[0]), []).append(column.name)
        return [f"{MISSING} ({_listed(where)}): {reason}" for reason, where in places.items()]


def rich_table(table: Table) -> RichTable:
    """For a rich console: numbers to the right, no cell read as markup, control characters written out."""
    made = RichTable(caption=Text(_printable(table.caption)) if table.caption else None)
    for place, column in enumerate(table.columns):
        # The names that rows go by stay whole where they are not very long: other columns give way.
        whole = place == 0 and all(len(str(row[0])) <= _WHOLE for row in table.rows)
        justify: Literal["left", "right"] = "left" if table.is_text(place) else "right"
        made.add_column(Text(_printable(column.name)), justify=justify, overflow="fold", no_wrap=whole)
    for row in table.shown_rows():
        made.add_row(*map(Text, row))
    return made


def to_text(table: Table, *, width: int = _TERMINAL_WIDTH) -> str:
    """The table as a terminal shows it, without colours.

    >>> print(to_text(Table((Column("model"), Column("win rate", 1)), (("new", 61.25), ("old", None)))))
    ┏━━━━━━━┳━━━━━━━━━━┓
    ┃ model ┃ win rate ┃
    ┡━━━━━━━╇━━━━━━━━━━┩
    │ new   │     61.2 │
    │ old   │        – │
    └───────┴──────────┘
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rich_table(table))
    for reason in table.reason_lines():
        console.print(Text(_printable(reason)))
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def to_json(table: Table) -> dict[str, Any]:
    """The table as JSON values; :func:`from_json` makes the table of them.

    ``caption``, ``columns`` (names), ``digits`` (of each, as shown), ``rows`` (objects by column name) with numbers whole and
    null for missing ones, and ``missing``: row, column and reason of each missing cell whose reason is known.
    """
    names = [column.name for column in table.columns]
    rows = [{name: json_ready(cell) for name, cell in zip(names, row, strict=True)} for row in table.rows]
    missing = [
        {"row": str(row[0]), "column": column, "reason": cell.reason}
        for row, cells in zip(table.rows, table.cells(), strict=True)
        for column, cell in zip(names, cells, strict=True)
        if cell.reason
    ]
    digits = [column.digits for column in table.columns]
    return {"caption": table.caption, "columns": names, "digits": digits, "rows": rows, "missing": missing}


def from_json(found: Mapping[str, Any]) -> Table:
    """The table that :func:`to_json` made these values of; of older ones, without reasons.

    >>> table = Table(columns("a", "b"), (("x", None),), "all", {("x", "b"): "unknown"})
    >>> from_json(to_json(table)) == table
    True
    """
    names = found["columns"]
    heads = tuple(map(Column, names, found.get("digits", [Column("").digits] * len(names))))
    reasons = {(one["row"], one["column"]): one["reason"] for one in found.get("missing", ())}
    return Table(heads, tuple(tuple(row[name] for name in names) for row in found["rows"]), found["caption"], reasons)


def to_csv(table: Table) -> str:
    """Names and rows, with numbers whole and an empty field for missing ones; the caption is left out.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    # csv writes None as an empty field.
    writer.writerows([map(_csv_cell, row) for row in ([column.name for column in table.columns], *table.rows)])
    return stream.getvalue()


def _csv_cell(cell: Cell) -> Cell:
    value: Cell = json_ready(cell)
    if not isinstance(value, str):
        return value
    # Python's csv does not quote a lone carriage return, and can't read it back.
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    if not _FORMULA.match(value):
        return value
    with contextlib.suppress(ValueError):
        float(value)
        return value
    return f"'{value}"


def to_latex(table: Table) -> str:
    r"""A ``table`` with booktabs' rules; every special character of names and cells is escaped.

    >>> print(to_latex(Table((Column("model"), Column("win rate (%)", 1)), (("a_b", 61.25),), "50% is even")))
    \begin{table}
    \centering
    \caption{50\% is even}
    \begin{tabular}{lr}
    \toprule
    model & win rate (\%) \\
    \midrule
    a\_b & 61.2 \\
    \bottomrule
    \end{tabular}
    \end{table}
    """
    kinds = "".join("l" if table.is_text(place) else "r" for place in range(len(table.columns)))
    names, *rows = (
        " & ".join(map(_latex_cell, cells)) + r" \\"
        for cells in ([column.name for column in table.columns], *table.shown_rows())
    )
    caption = [rf"\caption{{{escape_latex(table.caption)}}}"] if table.caption else []
    head = [r"\begin{table}", r"\centering", *caption, rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", names, r"\midrule"]
    return "\n".join([*head, *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def escape_latex(text: str) -> str:
    r"""Text in which LaTeX finds no command.

    >>> print(escape_latex("a_b & 5% \\x"))
    a\_b \& 5\% \textbackslash{}x
    """
    return _printable(text).translate(_LATEX)


def write_table(table: Table, path: str | Path) -> None:
    """Write a table in the form that the file's name ends in: .json, .csv, .tex or .txt.

    Raises:
        ValueError: another ending.
        OSError: the file can't be written.
    """
    write = _WRITERS.get(Path(path).suffix.lower())
    if write is None:
        raise ValueError(f"{path}: a table's file ends in .json, .csv, .tex or .txt")
    write_text_atomic(write(table).removesuffix("\n") + "\n", path)


# No ASCII escapes in JSON: names are to be read.
_WRITERS: Mapping[str, Callable[[Table], str]] = {
    ".json": lambda table: json.dumps(to_json(table), ensure_ascii=False, indent=2, allow_nan=False),
    ".csv": to_csv,
    ".tex": to_latex,
    ".txt": to_text,
}


def _latex_cell(text: str) -> str:
    # After \\ a bracket would be read as the row's extra space.
    escaped = escape_latex(text)
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped


def _listed(where: Mapping[str, Sequence[str]]) -> str:
    """Rows and columns in words; rows that share their columns together."""
    by_columns: dict[tuple[str, ...], list[str]] = {}
    for row, names in where.items():
        by_columns.setdefault(tuple(names), []).append(row)
    return "; ".join(f"{', '.join(rows)}: {', '.join(names)}" for names, rows in by_columns.items())


def _printable(text: str) -> str:
    """On one line, with what would steer a terminal written out."""
    return "".join(character if character.isprintable() else " " for character in visible(text))


def _shown(cell: Cell, digits: int) -> str:
    value = json_ready(cell)
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return MISSING if value is None else _printable(str(value))


def model_name(spec: str) -> str:
    """What tables call a model: its folder's or file's name; the run's where the folder is a run's ``model/`` or ``adapter/``.

    >>> model_name("HuggingFaceTB/SmolLM2-135M"), model_name("answers/new.jsonl")
    ('SmolLM2-135M', 'new')
    """
    path = Path(spec).resolve()
    if path.is_dir() and path.name in ("model", "adapter") and path.parent.name:
        return path.parent.name
    return path.name.removesuffix(".jsonl").removesuffix(".json") or spec

"""Writes the tables of docs/from-trl.md from the names that the command line knows: run it after a change of those."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ncalign.cli.other_names import Entry, tables

PAGE = Path(__file__).resolve().parents[1] / "from-trl.md"
_MARKED = re.compile(r"(<!-- (names|values): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _here(entry: Entry) -> str:
    if entry.skip:
        return "leave it out"
    if entry.lacks:
        return "not here"
    shown = " or ".join(f"`{use}`" for use in entry.use)
    return shown if entry.verb == "train" else f"{shown} of [{entry.verb}](verbs/{entry.verb}.md)"


def _remarks(entry: Entry, values: bool) -> Iterator[str]:
    yield from filter(None, (entry.note, entry.skip, entry.lacks))
    for value, answer in entry.values.items() if values else ():
        remark = answer.note or answer.skip or answer.lacks
        yield f"`{value}`: {_here(answer)}" + (f" ({remark})" if remark else "")


def _table(heading: str, rows: Mapping[str, Entry]) -> str:
    lines = [f"| {heading} | Here | Remark |", "|---|---|---|"]
    for names, entry in rows.items():
        same = entry.use == (names,) and entry.verb == "train"
        # The losses have a table of their own.
        remark = "; ".join(_remarks(entry, values="loss_type" not in names))
        lines.append(f"| {_code(names)} | {'the same' if same else _here(entry)} | {remark} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """Return the page with the tables between its marks made anew."""

    def made(found: re.Match[str]) -> str:
        opening, kind, title, closing = found.groups()
        if kind == "names":
            return f"{opening}\n{_table('There', tables()[title])}\n{closing}"
        rows = next(rows[title] for rows in tables().values() if title in rows)
        return f"{opening}\n{_table(f'`{title}`', _together(rows.values))}\n{closing}"

    return _MARKED.sub(made, page)


def _together(values: Mapping[str, Entry]) -> dict[str, Entry]:
    """Join neighbouring values that have the same answer into one row."""
    joined: dict[str, Entry] = {}
    for value, entry in values.items():
        names = next((names for names, other in joined.items() if other == entry and entry.lacks), None)
        if names is not None:
            joined = {f"{key}, {value}" if key == names else key: other for key, other in joined.items()}
        else:
            joined[value] = entry
    return joined


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

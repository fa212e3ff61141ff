"""Run every benchmark of this folder, one after the other, and gather their rows in results.json and RESULTS.md.

Each script takes ``--json FILE`` and writes a list of ``{name, value, goal, holds, spread, conditions}``; each row is given its
script's name here, the processor's kind (by what `dtype: auto` picks on it), date and commit. Rows of scripts that are not
run, and of processors of the other kind, are kept as they are. ``gpu.py`` is left out where there is no GPU; its rows are of
the kind gpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _steps import processor

HERE = Path(__file__).resolve().parent
KINDS = ("bf16", "fp32-only")
GPU, ON_GPU = "gpu", "gpu.py"
"""The kind of rows that come from a GPU, and the script that makes them."""
Row = dict[str, Any]


def main() -> int:
    """Run the scripts; 1 when a goal does not hold or a script fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each script (default 3)")
    parser.add_argument("--note", default="", help="what else to record of this run, such as other work on the machine")
    parser.add_argument("--page-only", action="store_true", help="write RESULTS.md from results.json, and run nothing")
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="their names (default: all)")
    arguments = parser.parse_args()
    wanted, results = set(arguments.scripts), HERE / "results.json"
    rows: list[Row] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    scripts = {script.name for script in HERE.glob("[!_]*.py")} - {Path(__file__).name}
    if wanted - scripts:
        parser.error(f"no such script: {', '.join(sorted(wanted - scripts))}; there are {', '.join(sorted(scripts))}")
    worst = 0
    if not arguments.page_only:
        if not wanted and not has_gpu():
            print(f"== {ON_GPU} is left out: there is no GPU", flush=True)
            scripts.discard(ON_GPU)
        stamp = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "note": arguments.note}
        for name in sorted(wanted or scripts):
            kind = GPU if name == ON_GPU else processor()
            code, found = run(name, arguments.repeats)
            worst = max(worst, code)
            rows = [row for row in rows if (row["script"], row["processor"]) != (name, kind)]
            rows += [{"script": name, **row, "processor": kind, **stamp} for row in found]
    rows.sort(key=lambda row: (row["script"], (*KINDS, GPU).index(row["processor"])))
    write(results, json.dumps(rows, indent=2) + "\n")
    write(HERE / "RESULTS.md", page(rows))
    print(f"== {len(rows)} rows in benchmarks/results.json and benchmarks/RESULTS.md")
    return min(worst, 1)


def run(name: str, repeats: int) -> tuple[int, list[Row]]:
    """A script's exit code and rows."""
    print(f"== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / name), "--repeats", str(repeats), "--json", str(output)]
        code = abs(subprocess.call(command))
        return code, json.loads(output.read_text()) if output.is_file() else []


def has_gpu() -> bool:
    """Whether there is a GPU that gpu.py can use."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.call([sys.executable, "-c", program]) == 0


def commit() -> str:
    """The commit that is measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def page(rows: Sequence[Row]) -> str:
    """The rows as a page: a table for each script, a column for each kind of processor."""
    lines = [
        "# Results",
        "",
        "Written by `make bench`. The smallest and the largest of the repeated values are in brackets; a value that misses its",
        "goal is bold. The kind of processor is what `dtype: auto` picks: bf16 where that multiplies faster, else fp32-only.",
    ]
    for script in dict.fromkeys(row["script"] for row in rows):
        own, kinds = [row for row in rows if row["script"] == script], (GPU,) if script == ON_GPU else KINDS
        lines += ["", f"## {script}", "", f"| what | goal | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
        for name in dict.fromkeys(row["name"] for row in own):
            same = {row["processor"]: row for row in own if row["name"] == name}
            goal = next(iter(same.values()))["goal"]
            cells = [cell(same[kind]) if kind in same else "not measured" for kind in kinds]
            lines.append(f"| {name} | {'–' if goal is None else goal} | {' | '.join(cells)} |")
        lines += ["", *dict.fromkeys(origin(row) for row in own)]
    return "\n".join(lines) + "\n"


def cell(row: Row) -> str:
    """A value and its spread."""
    low, high = row["spread"]
    value = f"**{row['value']:.4g}**" if row["holds"] is False else f"{row['value']:.4g}"
    return f"{value} ({low:.4g} to {high:.4g})"


def origin(row: Row) -> str:
    """Where, when and on what a row was measured."""
    note = f"; {row['note']}" if row["note"] else ""
    return f"- {row['processor']}, {row['date']}, commit {row['commit']}{note}: {row['conditions']}."


def write(target: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


if __name__ == "__main__":
    sys.exit(main())

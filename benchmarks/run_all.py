"""Run every benchmark of this folder, one after the other, and gather their rows in results.json and RESULTS.md.

Each script takes ``--json FILE`` and writes a list of ``{name, value, goal, holds, spread, conditions}``; each row is given its
script's name here. Of scripts that are not run the rows of before are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the scripts; 1 when a goal does not hold or a script fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each script (default 3)")
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="their names (default: all)")
    arguments = parser.parse_args()
    repeats, wanted = str(arguments.repeats), set(arguments.scripts)
    results = HERE / "results.json"
    found: dict[str, list[dict[str, object]]] = {}
    for row in json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []:
        found.setdefault(str(row["script"]), []).append(row)
    scripts = {script.name for script in HERE.glob("[!_]*.py")} - {Path(__file__).name}
    if wanted - scripts:
        parser.error(f"no such script: {', '.join(sorted(wanted - scripts))}; there are {', '.join(sorted(scripts))}")
    worst = 0
    for name in sorted(wanted or scripts):
        script = HERE / name
        print(f"== {script.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "rows.json"
            worst = max(worst, abs(subprocess.call([sys.executable, str(script), "--repeats", repeats, "--json", str(output)])))
            rows = json.loads(output.read_text()) if output.is_file() else []
            found[name] = [{"script": name, **row} for row in rows]
    found = {name: found[name] for name in sorted(found)}
    rows = [row for some in found.values() for row in some]
    write(results, json.dumps(rows, indent=2) + "\n")
    write(HERE / "RESULTS.md", page(found))
    print(f"== {len(rows)} rows in benchmarks/results.json and benchmarks/RESULTS.md")
    return min(worst, 1)


def page(found: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """The rows as a page: a table for each script."""
    lines = ["# Results", "", "Written by `make bench`. Spread: the smallest and the largest of the repeated values."]
    for script, rows in found.items():
        lines += ["", f"## {script}", ""]
        if not rows:
            lines.append("The script failed.")
            continue
        lines += ["| what | value | goal | holds | spread |", "|---|---|---|---|---|"]
        for row in rows:
            goal = "–" if row["goal"] is None else row["goal"]
            holds = {True: "yes", False: "**no**", None: "–"}[row["holds"]]  # type: ignore[index]
            low, high = row["spread"]  # type: ignore[misc]
            lines.append(f"| {row['name']} | {row['value']:.4g} | {goal} | {holds} | {low:.4g} to {high:.4g} |")
        lines += ["", *sorted({f"{row['conditions']}." for row in rows})]
    return "\n".join(lines) + "\n"


def write(target: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


if __name__ == "__main__":
    sys.exit(main())

"""Writes what docs/evidence and README.md say of studies from docs/evidence/data: ``python docs/extensions/evidence.py``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ncalign.core.atomic import write_text_atomic
from ncalign.report.charts import interval_chart, write_chart

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "evidence"
DATA, IMAGES = FOLDER / "data", FOLDER / "images"
AGAIN = DATA / "other-processor"
"""Results of the same studies on another processor: it rounds otherwise, so that its tiny model and candidates are others."""
README = DOCS.parent / "README.md"
SCALES = ("tiny", "small", "paper")
NEED_DATA = {("transfer", "small"), ("transfer", "paper")}
"""Studies that need a file of the user's."""
VERDICTS = ("opposite", "undecided", "holds")
"""What fails to replicate comes first."""
MARKED = re.compile(r"(<!-- evidence: (\w+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
Found = Mapping[str, Any]


def read_found(folder: Path = DATA) -> list[Found]:
    """Each study's results as its command wrote them, by name and scale."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(every, key=lambda found: (found["study"], SCALES.index(found["scale"])))


def with_evidence(page: str, every: Sequence[Found], *, root: str = "") -> str:
    """The page with what is between its marks made anew.

    Args:
        page: Markdown with marks ``<!-- evidence: study NAME -->``, ``line NAME``, ``summary`` or ``claims``, each up to
            ``<!-- end -->``.
        every: results of all studies.
        root: in front of links to pages of evidence.
    """

    def made(mark: re.Match[str]) -> str:
        opening, kind, name, closing = mark.groups()
        lines: Iterator[str]
        if kind == "study":
            lines = _study([found for found in every if found["study"] == name])
        elif kind == "summary":
            lines = _summary(every, root)
        elif kind == "claims":
            lines = _claims(every)
        elif kind == "line":
            lines = _line([found for found in every if found["study"] == name])
        else:
            raise ValueError(f"there is no evidence of kind {kind!r}: study NAME, line NAME, summary or claims is needed")
        return opening + "\n" + "\n".join(lines) + "\n\n" + closing

    return MARKED.sub(made, page)


def number(value: float | None, *, signed: bool = False) -> str:
    """A number as tables show it: three decimals, none where it is large; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}.{0 if abs(value) >= 100 else 3}f}"


def verdict_counts(rows: Sequence[Found]) -> str:
    """``1 opposite, 2 undecided, 4 hold``, without those that there are none of."""
    counts = Counter(row["verdict"] for row in rows)
    words = {"opposite": "opposite", "undecided": "undecided", "holds": "holds" if counts["holds"] == 1 else "hold"}
    return ", ".join(f"{counts[name]} {words[name]}" for name in VERDICTS if counts[name]) or "nothing compared"


def image_name(found: Found) -> str:
    """The file of a study's figure."""
    return f"{found['study']}-{found['scale']}.svg"


def draw(found: Found, folder: Path = IMAGES) -> Path | None:
    """Draw the main measure of each arm with its interval; None where no arm has one."""
    main = found["measures"][0]
    values = {
        row["arm"]: (float(row["mean"]), tuple(float("nan") if end is None else end for end in row["interval"]))
        for row in found["arms"]
        if row["measure"] == main
    }
    if not values:
        return None
    folder.mkdir(exist_ok=True)
    chart = interval_chart({main: values}, title=f"{found['study']} ({found['scale']})", unit=main)
    write_chart(chart, folder / image_name(found))
    return folder / image_name(found)


def _study(every: Sequence[Found]) -> Iterator[str]:
    """All that was found of a study, a section for each scale."""
    if not every:
        yield "Not run yet."
        return
    for place, found in enumerate(every):
        name, scale = found["study"], found["scale"]
        yield from (["", f"## {scale.capitalize()}", ""] if place else [f"## {scale.capitalize()}", ""])
        data = " --data FILE" if (name, scale) in NEED_DATA else ""
        yield from ["```console", f"$ ncalign study {name} --scale {scale} --seeds {found['seeds']}{data}", "```", ""]
        counts = verdict_counts(found["comparisons"])
        yield f"Of {len(found['comparisons'])} comparisons: **{counts}**. [All numbers](data/{name}-{scale}.json)"
        yield ""
        yield from _comparisons(found["comparisons"])
        yield ""
        yield from _arms(found)
        other = AGAIN / f"{name}-{scale}.json"
        if other.is_file():
            rows = json.loads(other.read_text(encoding="utf-8"))["comparisons"]
            yield from ["", f"On another processor, whose model and candidates are others: **{verdict_counts(rows)}**."]
            yield f"[All numbers](data/{AGAIN.name}/{other.name})"
            yield ""
            yield from _comparisons(rows)
        if any(row["measure"] == found["measures"][0] for row in found["arms"]):
            yield from ["", f"![{found['measures'][0]} of each arm, with 95 % intervals](images/{image_name(found)})"]
        if found["failed"]:
            yield from ["", f"{len(found['failed'])} runs failed: {', '.join(found['failed'])}."]


def _comparisons(rows: Sequence[Found]) -> Iterator[str]:
    yield "| Claim | Difference | 95 % interval | p (Holm) | Seeds | Prompts | Verdict |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: VERDICTS.index(row["verdict"])):
        cells = [number(row.get("mean"), signed=True), _interval(row), number(row.get("p_holm")), str(row["num_seeds"])]
        yield f"| {' | '.join((row['claim'], *cells, str(row.get('num_prompts', '–')), _decided(row)))} |"


def _arms(found: Found) -> Iterator[str]:
    """Each arm's means with half of their intervals."""
    known = {(row["arm"], row["measure"]): row for row in found["arms"]}
    measures = [name for name in found["measures"] if any(row["measure"] == name for row in found["arms"])]
    yield f"| Arm | {' | '.join(measures)} |"
    yield "|---" * (len(measures) + 1) + "|"
    for arm in found["arm_settings"]:
        cells = []
        for measure in measures:
            row = known.get((arm, measure))
            low, high = row["interval"] if row else (None, None)
            half = "" if low is None or high is None else f" ± {number((high - low) / 2)}"
            cells.append(f"{number(row['mean'])}{half}" if row else "–")
        yield f"| {' | '.join((arm, *cells))} |"


def _summary(every: Sequence[Found], root: str) -> Iterator[str]:
    """A row for each study, those with the most that fails at the first scale first."""
    if not every:
        yield "Not run yet."
        return
    studies: dict[str, list[Found]] = {}
    for found in every:
        studies.setdefault(found["study"], []).append(found)
    yield "| Claim | Source | Study | Comparisons |"
    yield "|---|---|---|---|"
    for name, scales in sorted(studies.items(), key=lambda one: _failing(one[1][0])):
        first = scales[0]
        counts = [f"{one['scale']}, {one['seeds']} seeds: {verdict_counts(one['comparisons'])}{_again(one)}" for one in scales]
        yield f"| {first['claim']} | {first['source']} | [{name}]({root}{name}.md) | {'; '.join(counts)} |"


def _again(found: Found) -> str:
    """The verdicts on another processor, where the study ran there too."""
    other = AGAIN / f"{found['study']}-{found['scale']}.json"
    if not other.is_file():
        return ""
    return f" (other processor: {verdict_counts(json.loads(other.read_text(encoding='utf-8'))['comparisons'])})"


def _failing(found: Found) -> tuple[float, ...]:
    counts, total = Counter(row["verdict"] for row in found["comparisons"]), len(found["comparisons"])
    return tuple(-counts[name] / total for name in VERDICTS[:2])


def _claims(every: Sequence[Found]) -> Iterator[str]:
    """Every comparison of every study."""
    rows = [(found, row) for found in every for row in found["comparisons"]]
    if not rows:
        yield "Not run yet."
        return
    yield f"Of all {len(rows)} comparisons: {verdict_counts([row for _, row in rows])}."
    yield ""
    yield "| Study | Claim | Difference | 95 % interval | Verdict |"
    yield "|---|---|---|---|---|"
    for found, row in sorted(rows, key=lambda one: VERDICTS.index(one[1]["verdict"])):
        cells = (number(row.get("mean"), signed=True), _interval(row), _decided(row))
        yield f"| [{found['study']}]({found['study']}.md), {found['scale']} | {' | '.join((row['claim'], *cells))} |"


def _line(every: Sequence[Found]) -> Iterator[str]:
    """The steps of a study whose arms are named by a number, against the line through the first step."""
    if not every:
        yield "Not run yet."
        return
    yield "| Scale | Step | Gain | 95 % interval | If it were linear | Within the interval |"
    yield "|---|---|---|---|---|---|"
    for found in every:
        slope = None
        for row in found["comparisons"]:
            more, fewer = (int(re.sub(r"\D", "", row[arm])) for arm in ("better", "worse"))
            if row.get("mean") is None or row["interval"][0] is None:
                continue
            slope = row["mean"] / (more - fewer) if slope is None else slope
            expected, (low, high) = slope * (more - fewer), row["interval"]
            inside = "yes" if low <= expected <= high else "no"
            cells = (found["scale"], f"{fewer} to {more}", number(row["mean"], signed=True), _interval(row))
            yield f"| {' | '.join((*cells, number(expected, signed=True), inside))} |"


def _interval(row: Found) -> str:
    low, high = row.get("interval") or (None, None)
    return "–" if low is None else f"{number(low, signed=True)} to {number(high, signed=True)}"


def _decided(row: Found) -> str:
    return f"{row['verdict']}: {row['why']}" if row["why"] else str(row["verdict"])


def write_all() -> list[Path]:
    """Fill every page that has marks, draw the figures, and return what was written."""
    every = read_found()
    written = [path for found in every if (path := draw(found)) is not None]
    for path in (*sorted(FOLDER.glob("*.md")), README):
        page = path.read_text(encoding="utf-8")
        write_text_atomic(with_evidence(page, every, root="docs/evidence/" if path == README else ""), path)
        written.append(path)
    return written


if __name__ == "__main__":
    print(*write_all(), sep="\n")

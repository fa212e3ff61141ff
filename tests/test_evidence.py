"""The pages of docs/evidence: every number in them is one that a study's command wrote, and every study has its page."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ncalign.study.spec import read_study, shipped

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

from evidence import AGAIN, DATA, FOLDER, IMAGES, MARKED, README, draw, image_name, number, read_found, with_evidence  # noqa: E402

PAGES = sorted(FOLDER.glob("*.md"))
FILES = sorted(DATA.glob("*.json"))
# Code and links name settings and files; the papers' tables and figures, and the level of all intervals, are no results.
NOT_RESULTS = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|95 %", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.-])[-+−]?\d[\d,]*(?:\.\d+)?|(?<![\w\d])[-+−]?\.\d+")


def numbers_of(value: Any) -> Iterator[float]:
    """Every number in JSON values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers_of(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def typed_numbers(page: str) -> list[str]:
    """Numbers that were typed, outside of what is written from results."""
    return NUMBER.findall(NOT_RESULTS.sub(" ", MARKED.sub(" ", page)))


def is_found(text: str, values: list[float]) -> bool:
    """Whether a typed number is one of these, rounded as it is."""
    digits = len(text.partition(".")[2])
    typed = float(text.replace(",", "").replace("\u2212", "-"))
    return any(round(value * scale, digits) == typed for value in values for scale in (1, 100) for value in (value, abs(value)))


@pytest.mark.parametrize("path", [*PAGES, README], ids=lambda path: path.name)
def test_tables_and_verdicts_are_those_of_the_results(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert "<!-- evidence:" in page
    assert page.count("<!-- evidence:") == len(MARKED.findall(page))
    root = "docs/evidence/" if path == README else ""
    assert page == with_evidence(page, read_found(), root=root), "run docs/extensions/evidence.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_other_number_is_typed(path: Path) -> None:
    every = [*read_found(), *read_found(AGAIN)]
    values = [value for found in every if path.stem in (found["study"], "index") for value in numbers_of(found)]
    wrong = [text for text in typed_numbers(path.read_text(encoding="utf-8")) if not is_found(text, values)]
    assert wrong == []


def test_a_number_that_was_made_up_is_noticed() -> None:
    page = "It rose by .31 (0.25 to 1,234) with `K = 8`, arXiv 2502.04567, [here](table-3.md), at 95 %.\n"
    page += "<!-- evidence: claims -->\n9\n<!-- end -->"
    assert typed_numbers(page) == [".31", "0.25", "1,234"]
    assert is_found(".31", [0.3149])
    assert is_found("31", [0.3149])  # percent
    assert is_found("-0.5", [-0.4999])
    assert not is_found(".32", [0.3149])
    assert not is_found("1,234", [0.3149])


@pytest.mark.parametrize("path", [*FILES, *AGAIN.glob("*.json")], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_results_are_of_the_studies_that_are_shipped(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == f"{found['study']}-{found['scale']}"
    study = read_study(found["study"], scale=found["scale"])
    assert found["arm_settings"] == json.loads(json.dumps(study.file.arms)), "the study's arms changed: run it again"
    assert [row["claim"] for row in found["comparisons"]] == [one.text() for one in study.claims]
    assert found["measures"] == list(study.measures)
    assert (found["claim"], found["source"]) == (study.file.claim, study.file.source)
    assert found["failed"] == {}
    assert "/" not in "".join(row["why"] for row in found["comparisons"])
    assert (IMAGES / image_name(found)).stat().st_size > 0


def test_every_study_has_a_page_that_is_in_the_navigation() -> None:
    assert {path.stem for path in PAGES} == {*shipped(), "index"}
    navigation = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    for path in PAGES:
        assert f"evidence/{path.name}" in navigation
        page = path.read_text(encoding="utf-8")
        if path.stem != "index":
            assert f"<!-- evidence: study {path.stem} -->" in page
            assert "## What it does not show" in page


class TestRendering:
    def found(self, **changes: Any) -> dict[str, Any]:
        row = {"claim": "b > a by reward", "better": "M3", "worse": "M1", "mean": 0.12345, "interval": [0.01, 0.23], "why": ""}
        row |= {"p_holm": 0.004, "num_seeds": 3, "num_prompts": 8, "verdict": "holds"}
        opposite = row | {"claim": "c > a by reward", "better": "M10", "worse": "M3", "mean": -0.2, "interval": [-0.3, -0.1]}
        arms = [{"arm": arm, "measure": "reward", "mean": 0.5, "interval": [0.25, 0.75]} for arm in ("a", "b")]
        return {
            "study": "kernels",
            "scale": "tiny",
            "claim": "Hard negatives",
            "source": "paper",
            "seeds": 3,
            "arm_settings": {"a": {}, "b": {}, "c": {}},
            "measures": ["reward"],
            "comparisons": [row, opposite | {"verdict": "opposite"}],
            "arms": arms,
            "failed": {},
        } | changes

    def test_what_fails_comes_first(self) -> None:
        page = with_evidence("<!-- evidence: study kernels -->\n<!-- end -->", [self.found()])
        assert "1 opposite, 1 holds" in page
        assert page.index("| c > a by reward | -0.200 | -0.300 to -0.100 |") < page.index("| b > a by reward | +0.123 |")
        assert "| a | 0.500 ± 0.250 |" in page
        assert "| c | – |" in page
        better = self.found(study="noise", comparisons=self.found()["comparisons"][:1])
        summary = with_evidence("<!-- evidence: summary -->\n<!-- end -->", [better, self.found()], root="docs/")
        assert summary.index("docs/kernels.md") < summary.index("docs/noise.md")
        claims = with_evidence("<!-- evidence: claims -->\n<!-- end -->", [better, self.found()])
        assert "Of all 3 comparisons: 1 opposite, 2 hold" in claims

    def test_a_page_that_was_altered_is_another(self) -> None:
        page = with_evidence("<!-- evidence: study kernels -->\n<!-- end -->", [self.found()])
        assert with_evidence(page, [self.found()]) == page
        assert with_evidence(page.replace("0.123", "0.124"), [self.found()]) == page
        with pytest.raises(ValueError, match="no evidence of kind 'studies'"):
            with_evidence("<!-- evidence: studies -->\n<!-- end -->", [])
        assert "Not run yet" in with_evidence("<!-- evidence: study noise -->\n<!-- end -->", [self.found()])

    def test_steps_are_set_against_a_line(self) -> None:
        page = with_evidence("<!-- evidence: line kernels -->\n<!-- end -->", [self.found()])
        assert "| tiny | 1 to 3 | +0.123 | +0.010 to +0.230 | +0.123 | yes |" in page
        # Seven more negatives at the first step's gain for each.
        assert f"| tiny | 3 to 10 | -0.200 | -0.300 to -0.100 | {number(7 * 0.12345 / 2, signed=True)} | no |" in page

    def test_one_seed_has_no_interval(self) -> None:
        row = {"claim": "b > a by reward", "mean": 0.1, "interval": [None, None], "num_seeds": 1, "verdict": "undecided"}
        one = self.found(comparisons=[row | {"why": "one seed can't tell", "p_holm": None, "better": "M3", "worse": "M1"}])
        page = with_evidence("<!-- evidence: study kernels -->\n<!-- end -->", [one])
        assert "| b > a by reward | +0.100 | – | – | 1 | – | undecided: one seed can't tell |" in page

    def test_the_figure_is_drawn(self, tmp_path: Path) -> None:
        path = draw(self.found(), tmp_path / "images")
        assert path is not None
        assert path.name == "kernels-tiny.svg"
        assert draw(self.found(arms=[]), tmp_path / "images") is None

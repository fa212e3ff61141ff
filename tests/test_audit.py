"""The audit tells data sets with known failures apart, and its numbers are those of a count by hand."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncalign.audit import measure_group, run_audit
from ncalign.audit.measures import best_of, likeness, rank_correlation, words
from ncalign.audit.run import length_regression
from ncalign.cli import main
from ncalign.config import AuditConfig
from ncalign.groups import Candidate, Group

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = [f"w{k}" for k in range(400)]
Rows = list[dict[str, Any]]


def text(chance: random.Random, low: int = 20, high: int = 60) -> list[str]:
    return [chance.choice(VOCABULARY) for _ in range(chance.randint(low, high))]


def planted(kind: str, num_groups: int = 60, num_candidates: int = 6, seed: int = 0) -> Rows:
    """Groups with one failure planted, or none."""
    chance, rows = random.Random(f"{kind} {seed}"), []
    for number in range(num_groups):
        candidates = [text(chance) for _ in range(num_candidates)]
        rewards = [chance.random() for _ in candidates]
        best = rewards.index(max(rewards))
        if kind == "token_swap":
            for k in range(num_candidates):
                if k != best:
                    candidates[k] = list(candidates[best])
                    for _ in range(4):
                        i, j = chance.randrange(len(candidates[k])), chance.randrange(len(candidates[k]))
                        candidates[k][i], candidates[k][j] = candidates[k][j], candidates[k][i]
        joined = [" ".join(words) for words in candidates]
        if kind == "near_duplicates":
            for k in range(1, num_candidates, 2):
                joined[k] = joined[k - 1].upper().replace(" ", ", ") + "."
        if kind == "length_bias":
            rewards = [len(words) + chance.random() for words in candidates]
        prompt = " ".join(text(chance))
        pairs = [{"completion": c, "reward": r} for c, r in zip(joined, rewards, strict=True)]
        rows.append({"id": str(number), "prompt": prompt, "candidates": pairs})
    return rows


def audit(rows: Rows, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_audit(AuditConfig.model_validate({"data": tmp_path / "data.jsonl", "output_dir": tmp_path / "audit", **changes}))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["healthy", "token_swap", "near_duplicates", "length_bias"])
def test_planted_failures_are_told_apart(kind: str, seed: int, tmp_path: Path) -> None:
    found = audit(planted(kind, seed=seed), tmp_path)
    problems = {finding["name"] for finding in found["findings"] if finding["level"] == "problem"}
    assert problems == (set() if kind == "healthy" else {kind})
    assert ("healthy" in {finding["name"] for finding in found["findings"]}) == (kind == "healthy")


def test_no_spread_is_a_problem(tmp_path: Path) -> None:
    rows = planted("healthy")
    for row in rows:
        for candidate in row["candidates"]:
            candidate["reward"] = 1.0
    found = audit(rows, tmp_path)
    assert [finding["name"] for finding in found["findings"] if finding["level"] == "problem"] == ["no_spread"]


def test_the_page_escapes_the_data_and_all_is_written(tmp_path: Path) -> None:
    rows = planted("token_swap", num_groups=8)
    rows[0]["prompt"] = "<script>alert(1)</script>"
    for row in rows:
        row["candidates"][0]["completion"] += " <img src=x onerror=alert(1)>"
    audit(rows, tmp_path)
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "data:image/png;base64,iVBOR" in page
    saved = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert saved["numbers"]["groups"] == 8
    assert saved["sizes"] == {"6": 8}


def test_counts(tmp_path: Path) -> None:
    def row(number: int, prompt: str, *rewards: float | None) -> dict[str, Any]:
        candidates = [{"completion": f"{k} {number}", "reward": r, "source": f"m{k}"} for k, r in enumerate(rewards)]
        return {"id": str(number), "prompt": prompt, "candidates": candidates}

    rows = [row(0, "One thing?", 1, 1, 0), row(1, "one THING", 0, None), row(2, "Other", 3, 3)]
    numbers = audit(rows, tmp_path)["numbers"]
    assert numbers["groups/with_spread"] == pytest.approx(1 / 3)
    assert numbers["rewards/missing"] == pytest.approx(1 / 7)
    assert numbers["rewards/tied_best"] == pytest.approx(1 / 3)
    assert numbers["prompts/duplicates"] == pytest.approx(2 / 3)
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["sources"] == {"m0": 3, "m1": 3, "m2": 1}


def test_the_sample_is_drawn_from_all(tmp_path: Path) -> None:
    found = audit(planted("healthy", num_groups=100), tmp_path, sample=10)
    assert (found["sampled"], found["numbers"]["groups"]) == (10, 100)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), st.randoms())
def test_likeness(letters: list[str], chance: random.Random) -> None:
    other = list(letters)
    chance.shuffle(other)
    same, moved = likeness(letters, letters), likeness(letters, other)
    assert (same.edit, same.bag, same.trigrams) == (1.0, 1.0, 1.0)
    assert moved.bag == 1.0
    assert 0 <= moved.edit <= 1
    assert likeness(letters, ["x"]).edit == likeness(letters, ["x"]).bag == 0.0


@given(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=6), st.data())
def test_best_of_is_the_mean_over_all_draws(rewards: list[float], data: st.DataObject) -> None:
    from itertools import combinations

    k = data.draw(st.integers(1, len(rewards)))
    assert best_of(rewards, k) == pytest.approx(np.mean([max(chosen) for chosen in combinations(rewards, k)]))


def test_length_is_taken_within_groups() -> None:
    def group(*pairs: tuple[int, float]) -> Group:
        return Group(id="g", prompt="P", candidates=[Candidate(" ".join("x" * n), reward=r) for n, r in pairs])

    # Each group's rewards are a line in length, on levels of their own.
    measured = [measure_group(group((1, 10.0), (3, 11.0), (5, 12.0)), compare=False)]
    measured += [measure_group(group((2, -1.0), (4, 0.0)), compare=False)]
    assert length_regression(measured) == (pytest.approx(1.0), pytest.approx(0.5))
    assert measured[0].length_correlation == pytest.approx(1.0)
    assert measured[1].length_correlation is None
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


def test_words() -> None:
    assert words("The cat's, HAT — naïve 3.5!") == ["the", "cat", "s", "hat", "naïve", "3", "5"]


def test_the_kernel_of_a_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = planted("healthy", num_groups=6, num_candidates=4)
    small = {"model": str(tiny_model_dir), "max_length": 400, "sample": 6}
    flat = audit(rows, tmp_path, reference_model=str(tiny_model_dir), **small)["numbers"]
    # A policy that is its own reference has no preference: every lower-scored candidate is as likely as another.
    assert flat["kernel/entropy"] == pytest.approx(1.0)
    assert flat["kernel/effective_share"] == pytest.approx(1.0)
    assert flat["kernel/likeness_drawn"] == pytest.approx(flat["kernel/likeness_random"])
    assert flat["kernel/length_drawn"] == pytest.approx(1.0)
    sharp = audit(rows, tmp_path, **small)["numbers"]
    # By its log-prob alone a model prefers what is short.
    assert sharp["kernel/entropy"] < 0.5
    assert sharp["kernel/length_drawn"] < 1.0


def test_likeness_in_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sentence_transformers")

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            if name == "none":
                raise OSError("no such model\nmore")

        def encode(self, texts: list[str], *, normalize_embeddings: bool) -> Any:
            assert normalize_embeddings
            # A direction for each group's first word: alike within a group, unlike across.
            angles = [float(text.split()[0][1:]) for text in texts]
            return np.array([[math.cos(a), math.sin(a)] for a in angles])

    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    rows = planted("healthy", num_groups=10)
    for number, row in enumerate(rows):
        for candidate in row["candidates"]:
            candidate["completion"] = f"w{number} " + candidate["completion"]
    numbers = audit(rows, tmp_path, embedder="some")["numbers"]
    assert numbers["meaning/best_to_others"] == pytest.approx(1.0)
    assert numbers["meaning/random"] < 0.9
    with pytest.raises(ValueError, match=r"embedder 'none' can't be loaded: no such model$"):
        audit(rows, tmp_path, embedder="none")


def test_the_verb(tmp_path: Path, groups_file: Path, capsys: Any) -> None:
    assert main(["audit", str(groups_file), "--output_dir", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "12 groups, 3.0 candidates each" in shown
    assert "Report: " in shown
    assert main(["audit", str(tmp_path / "no.jsonl"), "--output_dir", str(tmp_path / "b")]) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
def test_real_sets_are_audited_whole(tmp_path: Path) -> None:
    for name in ("gsm8k-model-solutions/example_model_solutions.jsonl", "alpaca-eval-candidates/candidates.jsonl.gz"):
        found = run_audit(AuditConfig(data=SHARED / name, output_dir=tmp_path / name, sample=40))
        assert found["rows_skipped"] == 0
        assert found["findings"]

"""The audit tells data sets with known failures apart, and its numbers are those of a count by hand."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncalign.audit.audit import run_audit
from ncalign.audit.config import AuditConfig
from ncalign.audit.copies import clusters_across, clusters_of
from ncalign.audit.measures import agreement, best_of, length_regression, measure_group
from ncalign.audit.ranges import alpha_range, beta_range, effective_numbers, padded, sample_sizes
from ncalign.audit.texts import likeness, words
from ncalign.cli.app import main
from ncalign.data.groups import Candidate, Group

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = [f"w{k}" for k in range(400)]
Rows = list[dict[str, Any]]


def text(chance: random.Random, low: int = 20, high: int = 60) -> list[str]:
    return [chance.choice(VOCABULARY) for _ in range(chance.randint(low, high))]


def swapped(words: list[str], how: str, chance: random.Random) -> list[str]:
    found = list(words)
    if how == "shuffled":
        chance.shuffle(found)
    for _ in range({"neighbours": 3, "far": 4, "exchanged": max(2, len(found) // 6)}.get(how, 0)):
        i, j = chance.randrange(len(found) - 1), chance.randrange(len(found))
        if how == "neighbours":
            found[i], found[i + 1] = found[i + 1], found[i]
        elif how == "far":
            found[i], found[j] = found[j], found[i]
        else:
            found[i] = chance.choice(VOCABULARY)
    return found


def copied(words: list[str], how: str, chance: random.Random) -> str:
    text = " ".join(words)
    if how == "case":
        return text.upper().replace(" ", ", ") + "."
    if how == "a word":
        k = chance.randrange(len(words))
        return " ".join([*words[:k], "other", *words[k + 1 :]])
    return f"{text} I hope so." if how == "a tail" else text


def lengths(texts: list[str], how: str, chance: random.Random) -> list[float]:
    sizes = [float(len(text.split())) for text in texts]
    if how == "noisy":
        return [size + chance.gauss(0, 3) for size in sizes]
    return {
        "words": sizes,
        "characters": [float(len(text)) for text in texts],
        "logarithm": [math.log(size) for size in sizes],
        "brevity": [-size for size in sizes],
    }[how]


def planted(kind: str, how: str = "", num_groups: int = 60, num_candidates: int = 6, seed: int = 0) -> Rows:
    """Groups with one failure planted, or none."""
    chance, rows = random.Random(f"{kind} {how} {seed}"), []
    for number in range(num_groups):
        candidates = [text(chance) for _ in range(num_candidates)]
        rewards = [chance.random() for _ in candidates]
        best = rewards.index(max(rewards))
        if kind == "token_swap":
            candidates = [c if k == best else swapped(candidates[best], how, chance) for k, c in enumerate(candidates)]
        joined = [" ".join(words) for words in candidates]
        if kind == "near_duplicates":
            joined = [joined[k] if k % 2 == 0 else copied(candidates[k - 1], how, chance) for k in range(num_candidates)]
        if kind == "length_bias":
            rewards = lengths(joined, how, chance)
        prompt = " ".join(text(chance))
        pairs = [{"completion": c, "reward": r} for c, r in zip(joined, rewards, strict=True)]
        rows.append({"id": str(number), "prompt": prompt, "candidates": pairs})
    return rows


PLANTS = [
    ("healthy", ""),
    *(("token_swap", how) for how in ("far", "neighbours", "shuffled", "exchanged")),
    *(("near_duplicates", how) for how in ("case", "a word", "a tail", "exactly")),
    *(("length_bias", how) for how in ("words", "characters", "logarithm", "noisy", "brevity")),
]


def audit(rows: Rows, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"data": tmp_path / "data.jsonl", "output_dir": tmp_path / "audit", "overwrite": True, **changes}
    return run_audit(AuditConfig.model_validate(fields))


def problems(found: dict[str, Any]) -> set[str]:
    return {finding["name"] for finding in found["findings"] if finding["level"] == "problem"}


@pytest.mark.parametrize("num_candidates", [2, 4, 8])
@pytest.mark.parametrize(("kind", "how"), PLANTS)
def test_planted_failures_are_told_apart(kind: str, how: str, num_candidates: int, tmp_path: Path) -> None:
    found = audit(planted(kind, how, num_candidates=num_candidates), tmp_path)
    assert problems(found) == (set() if kind == "healthy" else {kind})
    assert ("healthy" in {finding["name"] for finding in found["findings"]}) == (kind == "healthy")


@pytest.mark.parametrize("size", [5, 6, 8])
@pytest.mark.parametrize("num_candidates", [4, 8])
def test_short_texts_swapped_alike_are_swapped_and_no_copies(size: int, num_candidates: int, tmp_path: Path) -> None:
    chance, rows = random.Random(size), []
    for k in range(80):
        best = chance.sample(VOCABULARY, size)
        others = []
        for _ in range(num_candidates - 1):
            words = list(best)
            for _ in range(2):
                i = chance.randrange(size - 1)
                words[i], words[i + 1] = words[i + 1], words[i]
            others.append(words)
        candidates = [
            {"completion": " ".join(w), "reward": 2.0 if n == 0 else chance.random()} for n, w in enumerate([best, *others])
        ]
        rows.append({"prompt": f"p{k}", "candidates": candidates})
    assert problems(audit(rows, tmp_path)) == {"token_swap"}


def test_answers_that_differ_in_a_number_are_real_alternatives(tmp_path: Path) -> None:
    chance, rows = random.Random(0), []
    for k in range(60):
        candidates = [
            {"completion": f"First I add the two numbers, and so the final answer is {n}.", "reward": float(n == k)}
            for n in chance.sample(range(k - 3, k + 4), 4)
        ]
        rows.append({"prompt": f"What is 0 + {k}?", "candidates": candidates})
    rows = [row for row in rows if any(c["reward"] for c in row["candidates"])]
    assert problems(audit(rows, tmp_path)) == set()


def test_no_spread_is_a_problem(tmp_path: Path) -> None:
    rows = planted("healthy")
    for row in rows:
        for candidate in row["candidates"]:
            candidate["reward"] = 1.0
    found = audit(rows, tmp_path)
    assert [finding["name"] for finding in found["findings"] if finding["level"] == "problem"] == ["no_spread"]


def test_the_page_escapes_the_data_and_all_is_written(tmp_path: Path) -> None:
    rows = planted("token_swap", "far", num_groups=8)
    rows[0]["prompt"] = "<script>alert(1)</script>"
    rows[0]["id"] = "<script>id</script>"
    for row in rows:
        row["candidates"][0]["completion"] += " <img src=x onerror=alert(1)> {{ 7*7 }} </style>"
        for k, candidate in enumerate(row["candidates"]):
            candidate["source"] = f"<script>{k}"
    audit(rows, tmp_path)
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; {{ 7*7 }} &lt;/style&gt;" in page
    assert page.count("</style>") == 1
    # Five distributions, lengths beside rewards, and sizes.
    assert page.count('<figure class="chart">') == 7
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
    assert same.duplicate
    assert not same.swapped
    assert moved.bag == 1.0
    assert 0 <= moved.edit <= 1
    assert likeness(letters, ["x"]).edit == likeness(letters, ["x"]).bag == 0.0


@pytest.mark.parametrize(("cut", "told"), [(0, False), (6, False), (12, True)])
def test_cut_candidates_are_a_finding(cut: int, told: bool, tmp_path: Path) -> None:
    rows = planted("healthy", num_groups=20, num_candidates=3)
    for row in rows[:cut]:
        row["candidates"][0]["finished"] = False
    found = audit(rows, tmp_path)
    said = [finding["text"] for finding in found["findings"] if finding["name"] == "incomplete"]
    # More than a tenth of the 60 are worth a warning.
    assert bool(said) == told
    assert not told or "12 of 60 completions are cut" in said[0]


@given(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=6), st.data())
def test_best_of_is_the_mean_over_all_draws(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    assert best_of(rewards, k) == pytest.approx(np.mean([max(chosen) for chosen in combinations(rewards, k)]))


def test_length_is_taken_within_groups() -> None:
    def group(*pairs: tuple[int, float]) -> Group:
        return Group(id="g", prompt="P", candidates=[Candidate(" ".join("x" * n), reward=r) for n, r in pairs])

    # Each group's rewards are a line in length, on levels of their own.
    measured = [measure_group(group((1, 10.0), (3, 11.0), (5, 12.0)))]
    measured += [measure_group(group((2, -1.0), (4, 0.0)))]
    assert length_regression(measured) == (pytest.approx(1.0), pytest.approx(0.5))
    assert measured[0].length_pairs == (3, 0, 3)
    assert measured[1].length_pairs == (1, 0, 1)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400)), max_size=7))
def test_agreement_is_a_count_over_pairs(both: list[tuple[int, int]]) -> None:
    def sign(first: tuple[int, int], second: tuple[int, int]) -> int:
        (r1, n1), (r2, n2) = first, second
        apart = abs(n1 - n2) > 0.03 * max(n1, n2)
        return (1 if (r1 > r2) == (n1 > n2) else -1) if apart else 0

    signs = [sign(first, second) for first, second in combinations(both, 2) if first[0] != second[0]]
    found = agreement([float(r) for r, _ in both], [n for _, n in both])
    assert found == (signs.count(1), signs.count(-1), len(signs))


def test_clusters_of_copies() -> None:
    a, b = "one two three four five six seven eight".split(), "a b c d e f g h i j".split()
    texts = [a, [*a[:3], "x", *a[4:]], b, a, [*b, "k"], ["1", *a[1:]], [a[1], a[0], *a[2:]]]
    members, pairs = clusters_of(texts)
    # A word exchanged or added is a copy; a number, or two words that changed places, is not.
    assert sorted(members) == [[0, 1, 3], [2, 4]]
    assert set(pairs) == {(0, 1), (0, 3), (1, 3), (2, 4)}


def test_copies_across_groups() -> None:
    chance = random.Random(1)
    texts = [text(chance, 30, 40) for _ in range(40)]
    stock = text(chance, 30, 40)
    for k in (3, 11, 29):
        texts[k] = list(stock)
    texts[30] = [*texts[31][:-1], "other"]
    assert clusters_across(texts, list(range(40))) == [3, 2]
    # The same group's copies are not copies across groups.
    assert clusters_across(texts, [0] * 40) == []


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=6), min_size=3, max_size=6))
def test_ranges_of_alpha_and_beta(groups: list[list[float]]) -> None:
    usable = [row for row in groups if np.std(row) > 1e-3]
    if not usable:
        return
    alphas, betas = alpha_range(usable), beta_range(usable)
    assert alphas is not None
    assert betas is not None
    size = np.median([len(row) for row in usable])
    numbers = [np.median(effective_numbers(*padded(usable), alpha).numpy()) for alpha in alphas]
    assert 1 <= numbers[0] < numbers[1] < size
    evenest, sharpest = (np.median(sample_sizes(*padded(usable), beta).numpy()) for beta in betas)
    assert evenest == pytest.approx(0.95 * size, rel=1e-4)
    assert sharpest < evenest
    assert betas[0] < betas[1]


def test_ranges_without_spread() -> None:
    assert alpha_range([[1.0, 1.0]]) is None
    assert beta_range([[1.0], [2.0, 2.0]]) is None


def test_noise_is_what_copies_differ_by(tmp_path: Path) -> None:
    rows = planted("near_duplicates", "case", num_groups=40, num_candidates=6)
    numbers = audit(rows, tmp_path)["numbers"]
    pairs = [(row["candidates"][k]["reward"], row["candidates"][k + 1]["reward"]) for row in rows for k in (0, 2, 4)]
    assert numbers["rewards/noise_pairs"] == len(pairs)
    assert numbers["rewards/noise_sd"] == pytest.approx(math.sqrt(np.mean([(a - b) ** 2 for a, b in pairs]) / 2))
    assert "noise" in {finding["name"] for finding in audit(rows, tmp_path)["findings"]}


def test_a_source_that_always_wins(tmp_path: Path) -> None:
    rows = planted("healthy", num_candidates=3)
    for row in rows:
        for k, candidate in enumerate(row["candidates"]):
            candidate |= {"source": f"m{k}", "reward": (k == 1) + candidate["reward"] / 10}
    found = audit(rows, tmp_path)
    assert "one_source" in {finding["name"] for finding in found["findings"]}
    assert [row["best"] for row in found["tables"]["sources"]] == [60, 0, 0]
    assert found["tables"]["sources"][0]["source"] == "m1"


def test_words() -> None:
    assert words("7+5 = 12") == ["7", "+", "5", "=", "12"]
    assert words("The cat's, HAT — naïve 3.5!") == ["the", "cat", "s", "hat", "naïve", "3", "5"]


def test_the_kernel_of_a_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = planted("healthy", num_groups=6, num_candidates=4)
    small = {"model": str(tiny_model_dir), "max_length": 400, "sample": 6}
    flat = audit(rows, tmp_path, reference_model=str(tiny_model_dir), **small)["numbers"]
    # A policy that is its own reference has no preference: every lower-scored candidate is as likely as another.
    assert flat["kernel/entropy"] == pytest.approx(1.0)
    assert flat["kernel/effective_share"] == pytest.approx(1.0)
    assert flat["kernel/likeness_drawn/words"] == pytest.approx(flat["kernel/likeness_random/words"])
    assert flat["kernel/false_negatives"] == pytest.approx(flat["kernel/false_negatives_random"])
    assert flat["kernel/length_drawn"] == pytest.approx(1.0)
    found = audit(rows, tmp_path, **small)
    sharp, tables = found["numbers"], found["tables"]
    # Without a reference, and with the policy as its own, implicit rewards are 0: L = 3 negatives that count alike.
    assert [row["variance"] for row in tables["pays_negatives"]] == pytest.approx([1.5, 1.125, 1.0])
    assert {name: value for name, value in sharp.items() if "pays" in name} == pytest.approx(
        {name: value for name, value in flat.items() if "pays" in name}
    )
    assert sharp["pays/alpha"] == pytest.approx((sharp["alpha/low"] * sharp["alpha/high"]) ** 0.5)
    assert "pays_candidates" in {finding["name"] for finding in found["findings"]}
    for line in ("mc_po, rnce: M negatives, drawn by the kernel", "nca: K candidates a group, all with gradients"):
        assert f"\n{line}\n" in found["text"]
    assert "How many negatives pay" in (tmp_path / "audit" / "audit.html").read_text(encoding="utf-8")
    assert sum(row["drawn"] for row in tables["kernel_by_rank"]) == pytest.approx(1.0)
    assert [row["random"] for row in tables["kernel_by_rank"]] == pytest.approx([1 / 3] * 3)
    shares = [row["effective_share"] for row in tables["kernel_by_beta"]]
    assert shares == sorted(shares, reverse=True)
    assert "hard_negatives" in {finding["name"] for finding in found["findings"]}
    # By its log-prob alone a model prefers what is short.
    assert sharp["kernel/entropy"] < 0.5
    assert sharp["kernel/length_drawn"] < 1.0


def test_likeness_in_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sentence_transformers")

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            if Path(name).name == "none":
                raise OSError("no such model\nmore")

        def encode(self, texts: list[str], *, normalize_embeddings: bool) -> Any:
            assert normalize_embeddings
            # A direction for each group's first word: alike within a group, unlike across.
            angles = [float(text.split()[0][1:]) for text in texts]
            return np.array([[math.cos(a), math.sin(a)] for a in angles])

    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, timeout: None)
    monkeypatch.setattr("ncalign.model.pickles.snapshot_download", lambda name, **_: str(tmp_path / Path(name).name))
    for name in ("some", "none"):
        (tmp_path / name).mkdir()
    rows = planted("healthy", num_groups=10)
    for number, row in enumerate(rows):
        for candidate in row["candidates"]:
            candidate["completion"] = f"w{number} " + candidate["completion"]
    numbers = audit(rows, tmp_path, embedder="some")["numbers"]
    assert numbers["meaning/best_to_others"] == pytest.approx(1.0)
    assert numbers["meaning/random"] < 0.9
    with pytest.raises(ValueError, match=r"embedder 'none' can't be loaded: no such model$"):
        audit(rows, tmp_path, embedder="none")


@pytest.mark.parametrize("option", ["embedder", "bertscore"])
@pytest.mark.parametrize("part", [".", "1_Dense"])
def test_pickled_weights_reach_no_library(
    option: str, part: str, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, made in (("sentence_transformers", "SentenceTransformer"), ("bert_score", "BERTScorer")):
        module = ModuleType(name)
        setattr(module, made, lambda *_, **__: pytest.fail("a library was given the model"))
        monkeypatch.setitem(sys.modules, name, module)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "training_args.bin").write_bytes(b"beside safetensors, and read by nobody")
    (model / part).mkdir(exist_ok=True)
    (model / "model.safetensors").rename(model / part / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin has no \*\.safetensors beside it.* save_pretrained"):
        audit(planted("healthy", num_groups=3), tmp_path, **{option: str(model)})


def test_groups_of_very_many_candidates_are_compared_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ncalign.audit.audit.MOST_COMPARED", 8)
    rows = planted("healthy", num_groups=3, num_candidates=40) + planted("healthy", num_groups=3, num_candidates=8, seed=1)
    for number, row in enumerate(rows):
        row["id"] = str(number)
        row["candidates"][17 % len(row["candidates"])]["reward"] = 9.0
    found = audit(rows, tmp_path)
    assert "3 groups have more than 8 candidates: of each the best and 7 others" in capsys.readouterr().err
    assert (found["large_groups"], found["numbers"]["candidates"]) == (3, 3 * 40 + 3 * 8)
    # The best, at 9, is always among them: seven others stand below it.
    assert [row["rank"] for row in found["tables"]["likeness_by_rank"]] == list(range(2, 9))
    assert found["numbers"]["rewards/spread"] > 8


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

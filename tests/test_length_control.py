"""Length-controlled win rates: alpaca-eval's numbers, where the solver stops, and what lengths can hide."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit

from alpaca_oracle import NUM_QUESTIONS, annotations, length_controlled, write_table
from ncalign.core.errors import DataError, MissingPackageError
from ncalign.stats.length_control import LengthControlled, length_controlled_win_rate, read_difficulty_table
from ncalign.stats.logistic import fit_logistic
from ncalign.stats.preferences import from_alpaca_eval

VARIANTS = {"length_controlled_v1": (True, True), "length_controlled_noreg": (True, False)} | {
    "length_controlled_minimal": (False, True)
}


def random_rows(seed: int, *, n: int = NUM_QUESTIONS) -> list[dict[str, Any]]:
    """Annotations whose judge likes length, with ties and missing verdicts among them."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(1, 3000, size=(2, n))
    logits = rng.normal(rng.normal(), 1, size=n) + 2 * (ours - theirs) / 1500
    preferences: list[float | None] = [float(value) for value in 1 + 1 / (1 + np.exp(-logits))]
    for i in rng.integers(n, size=n // 10):
        preferences[i] = [None, 0.0, 1.0, 1.5, 2.0][rng.integers(5)]
    return [
        dict(index=i, preference=preferences[i], output_1="x" * int(theirs[i]), output_2="x" * int(ours[i]))
        | dict(generator_1="old", generator_2="new", annotator="judge")
        for i in range(n)
    ]


def ours(rows: list[dict[str, Any]], name: str, table: Path) -> LengthControlled:
    with_table, regularized = VARIANTS[name]
    return length_controlled_win_rate(
        from_alpaca_eval([row["preference"] for row in rows]),
        np.array([len(row["output_2"]) for row in rows]),
        np.array([len(row["output_1"]) for row in rows]),
        table=read_difficulty_table(table) if with_table else None,
        questions=[row.get("index", i) for i, row in enumerate(rows)],
        regularized=regularized,
    )


def assert_equal(rows: list[dict[str, Any]], name: str, table: Path) -> None:
    expected, found = length_controlled(rows, name, table), ours(rows, name, table)
    assert found.win_rate == pytest.approx(expected["length_controlled_winrate"], abs=1e-6)
    assert found.standard_error == pytest.approx(expected["lc_standard_error"], abs=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("model", ["alpaca-7b", "gemma-2b-it"])
def test_equals_alpaca_eval_on_public_annotations(tmp_path: Path, model: str, name: str) -> None:
    assert_equal(annotations(model), name, write_table(tmp_path / "table.csv", seed=0))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_equals_alpaca_eval_on_random_annotations(tmp_path: Path, seed: int, name: str) -> None:
    assert_equal(random_rows(seed), name, write_table(tmp_path / "table.csv", seed=seed))


def test_equals_alpaca_eval_on_part_of_the_set(tmp_path: Path) -> None:
    rows = random_rows(7)[100:500:3]
    assert_equal(rows, "length_controlled_v1", write_table(tmp_path / "table.csv", seed=7))


@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 300.0])
def test_l1_fit_is_as_near_the_minimum_as_liblinear_stops(inverse_penalty: float) -> None:
    rng = np.random.default_rng(1)
    features = np.column_stack([np.tanh(rng.normal(size=200)), rng.normal(size=200), np.ones(200)])
    targets, weights = rng.uniform(size=200), rng.uniform(0.1, 2, size=200)

    def objective(split: np.ndarray) -> float:
        # Positive and negative parts, so that the penalty is smooth.
        logits = features @ (split[:3] - split[3:])
        return float(split.sum() + inverse_penalty * weights @ (np.logaddexp(0, logits) - targets * logits))

    def violation(at: np.ndarray) -> float:
        gradient = inverse_penalty * features.T @ (weights * (expit(features @ at) - targets))
        return float(np.where(at == 0, np.maximum(np.abs(gradient) - 1, 0), np.abs(gradient + np.sign(at))).sum())

    best = minimize(
        objective, np.full(6, 0.1), bounds=[(0, None)] * 6, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    found = fit_logistic(
        features, targets, weights, penalty="l1", inverse_penalty=inverse_penalty, seeds=np.random.RandomState(0)
    )
    split = np.concatenate([np.maximum(found, 0), np.maximum(-found, 0)])
    assert objective(split) <= best.fun + 1e-6 * abs(best.fun)
    # LIBLINEAR's rule: tolerance times the rarer label's share of the rows, here 200 of 400, relative to the start.
    assert violation(found) <= 1e-4 * 200 / 400 * violation(np.zeros(3))


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn: pip install .*\[eval\]'"):
        length_controlled_win_rate(np.full(10, 0.5), np.arange(10), np.arange(10) * 2)


def test_a_judge_of_length_alone_is_exposed() -> None:
    # The model writes more in most answers, and the verdict follows from the length alone: at equal lengths it is a coin.
    rng = np.random.default_rng(0)
    theirs = rng.integers(500, 1500, size=400)
    ours_ = theirs + rng.integers(-200, 1000, size=400)
    difference = ours_ - theirs
    preferences = expit(3 * np.tanh(difference / difference.std(ddof=1)))
    found = length_controlled_win_rate(preferences, ours_, theirs)
    assert 100 * preferences.mean() > 75
    assert found.win_rate == pytest.approx(50, abs=1)
    assert found.coefficients["length"] == pytest.approx(-3, abs=0.2)  # the baseline's length less the model's


def test_a_judge_who_does_not_see_length_is_left_alone() -> None:
    rng = np.random.default_rng(1)
    preferences = rng.uniform(size=600) ** 0.5
    ours_, theirs = rng.integers(100, 2000, size=(2, 600))
    found = length_controlled_win_rate(preferences, ours_, theirs)
    assert found.win_rate == pytest.approx(100 * preferences.mean(), abs=1)
    assert found.ci[0] < found.win_rate < found.ci[1]
    # The preferences' own standard error, about 1 point: 2 * 1.96 of it across.
    width = 2 * 1.96 * 100 * preferences.std() / np.sqrt(600)
    assert found.ci[1] - found.ci[0] == pytest.approx(width, rel=0.35)


def test_missing_verdicts_are_counted_and_predicted(tmp_path: Path) -> None:
    rows = random_rows(3)
    found = ours(rows, "length_controlled_minimal", tmp_path)
    missing = sum(row["preference"] is None for row in rows)
    assert missing > 0
    assert (found.num_missing, found.num_fitted) == (missing, len(rows) - missing)
    assert set(found.coefficients) == {"length", "model"}


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_a_model_that_lost_or_won_everything_keeps_its_rate(verdict: float) -> None:
    # alpaca-eval's solver sees a single class here, gives up and reports 50.
    rng = np.random.default_rng(0)
    ours_, theirs = rng.integers(1, 999, size=(2, 100))
    found = length_controlled_win_rate(np.full(100, verdict), ours_, theirs)
    assert found.win_rate == pytest.approx(100 * verdict, abs=1)
    assert all(math.isnan(bound) for bound in found.ci)


def votes(seed: int, won: int, n: int = 38) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many wins of n, and lengths that have nothing to do with them."""
    lengths = np.random.default_rng(seed).integers(100, 2000, size=(2, n))
    return np.arange(n) < won, lengths[0], lengths[1]


def test_what_the_penalty_decides_is_not_estimable_and_its_interval_is_the_fits_without() -> None:
    # 26 of 38 won, 68 %: of the random lengths some let cross-validation choose a penalty that leaves 50 % for every verdict.
    unknown = 0
    for seed in range(30):
        won, ours_, theirs = votes(seed, 26)
        found = length_controlled_win_rate(won.astype(float), ours_, theirs)
        if math.isnan(found.win_rate):
            unknown += 1
            assert math.isnan(found.standard_error)
        else:
            assert found.coefficients["model"] != 0
            assert found.ci[0] < found.win_rate < found.ci[1]
        # That of the plain win rate is 53 to 81: length explains nothing, and costs little.
        assert found.ci == pytest.approx((52, 82), abs=6)
    assert 1 <= unknown <= 15


def test_interval_is_that_of_the_fit_without_penalty_with_each_question_left_out_in_turn() -> None:
    rng = np.random.default_rng(2)
    ours_, theirs = rng.integers(100, 2000, size=(2, 60))
    preferences = (rng.uniform(size=60) < expit(0.6 + 0.8 * np.tanh((ours_ - theirs) / 800))).astype(float)
    found = length_controlled_win_rate(preferences, ours_, theirs)
    difference = (theirs - ours_).astype(float)
    rows = np.column_stack([np.tanh(difference / difference.std(ddof=1)), np.ones(60)])

    def theta(kept: np.ndarray) -> float:
        def loss(at: np.ndarray) -> float:
            return float((np.logaddexp(0, rows @ at) - preferences * (rows @ at))[kept].sum())

        return float(minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x[1])

    every = np.ones(60, dtype=bool)
    whole = theta(every)
    moved = np.array([theta(np.arange(60) != i) for i in range(60)]) - whole
    arm = stats.t.ppf(0.975, 59) * math.sqrt(float(moved @ moved))
    # One Newton step in place of each of the 60 fits.
    assert found.ci == pytest.approx((100 * expit(whole - arm), 100 * expit(whole + arm)), abs=0.5)


def test_verdicts_that_length_separates_have_no_estimate() -> None:
    # The longer answer always wins: no finite fit; with the penalty the rate is whatever the penalty makes it.
    theirs = np.full(40, 1000)
    ours_ = theirs + np.arange(-19, 21) * 30
    found = length_controlled_win_rate((ours_ > theirs).astype(float), ours_, theirs)
    assert all(math.isnan(value) for value in (found.win_rate, *found.ci))


def test_refuses_what_it_cannot_control_for(tmp_path: Path) -> None:
    p = np.full(10, 0.5)
    lengths = np.arange(10)
    with pytest.raises(ValueError, match="every answer is 5 characters longer"):
        length_controlled_win_rate(p, lengths + 5, lengths)
    with pytest.raises(ValueError, match="3 questions have a verdict"):
        length_controlled_win_rate(np.where(lengths < 3, 0.5, np.nan), lengths, lengths * 2)
    with pytest.raises(ValueError, match="lengths of 9 and 10 answers"):
        length_controlled_win_rate(p, lengths[:9], lengths)
    table = read_difficulty_table(write_table(tmp_path / "table.csv", seed=0, num_questions=8))
    with pytest.raises(ValueError, match=r"no row for question 8 \(2 are missing\)"):
        length_controlled_win_rate(p, lengths, lengths * 2, table=table)
    with pytest.raises(ValueError, match="questions names 3 places"):
        length_controlled_win_rate(p, lengths, lengths * 2, table=table, questions=[0, 1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,preference\n0,1\n", "std_delta_len, instruction_difficulty, not_gamed_baseline are missing"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n", "no rows"),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,1,x,0,True\n",
            "csv:2: std_delta_len is 'x'",
        ),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,2,1,0,True\n",
            "csv:2: the preference is 2",
        ),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,1,1,0\n", "not_gamed_baseline is None"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_difficulty_table(path)


def test_a_row_without_preference_still_tells_its_difficulty(tmp_path: Path) -> None:
    rows = random_rows(2)
    table = write_table(tmp_path / "table.csv", seed=2)
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[1:50] = [",".join([*line.split(",")[:2], "", *line.split(",")[3:]]) for line in lines[1:50]]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert_equal(rows, "length_controlled_v1", table)

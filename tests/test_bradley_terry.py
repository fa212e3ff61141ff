"""Bradley-Terry against scipy's minimum of the likelihood and closed forms; Arena-Hard's score; style control."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Literal

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from ncalign.core.errors import MissingPackageError
from ncalign.stats.arena_hard import arena_hard_scores
from ncalign.stats.bradley_terry import bradley_terry, fit_bradley_terry
from ncalign.stats.intervals import Bootstrap
from ncalign.stats.preferences import complete_games
from ncalign.stats.records import Game
from ncalign.stats.style import Style, style_differences, style_of


def round_robin(seed: int, *, num_models: int = 5, num_questions: int = 60) -> list[Game]:
    """Games of all pairs in both orders; wins, losses, ties, soft verdicts and strong ones, from known strengths."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(0, 0.8, size=num_models)
    games = []
    for (i, j), q, first in itertools.product(
        itertools.combinations(range(num_models), 2), range(num_questions), (True, False)
    ):
        preference: float | None = float(rng.random() < expit(theta[i] - theta[j]))
        preference = [preference, 0.5, float(rng.random()), None][rng.choice(4, p=[0.7, 0.1, 0.15, 0.05])]
        games.append(Game(f"q{q}", f"m{i}", f"m{j}", first, preference, weight=int(rng.choice([1, 3]))))
    return games


NO_INTERVALS = Bootstrap(num_rounds=0)


def minimum(design: np.ndarray, outcomes: np.ndarray, weights: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """The minimum of the negative log-likelihood as docs/evaluation.md writes it, by scipy's trust-region method."""
    total = weights.sum()

    def objective(theta: np.ndarray) -> float:
        logits = design @ theta
        return float((weights @ (np.logaddexp(0, logits) - outcomes * logits) + ridge / 2 * theta @ theta) / total)

    def gradient(theta: np.ndarray) -> np.ndarray:
        return (design.T @ (weights * (expit(design @ theta) - outcomes)) + ridge * theta) / total

    def hessian(theta: np.ndarray) -> np.ndarray:
        chances = expit(design @ theta)
        return ((design.T * (weights * chances * (1 - chances))) @ design + ridge * np.eye(len(theta))) / total

    start = np.zeros(design.shape[1])
    found = minimize(objective, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-9})
    return np.asarray(found.x)


def design_of(games: list[Game], anchor: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    judged = [game for game in games if game.preference is not None]
    names = sorted({name for game in judged for name in (game.model, game.baseline)} - {anchor})
    design = np.array([[(game.model == name) - (game.baseline == name) for name in names] for game in judged], dtype=float)
    return design, np.array([game.preference for game in judged]), np.array([float(game.weight) for game in judged]), names


@pytest.mark.parametrize("seed", range(4))
def test_is_at_the_minimum_that_scipy_finds(seed: int) -> None:
    games = round_robin(seed)
    found = bradley_terry(games, anchor="m0", bootstrap=NO_INTERVALS)
    design, outcomes, weights, names = design_of(games, "m0")
    expected = dict(zip(names, minimum(design, outcomes, weights), strict=True)) | {"m0": 0.0}
    for strength in found.strengths:
        theta = expected[strength.model]
        assert strength.rating == pytest.approx(1000 + 400 / math.log(10) * theta, abs=1e-4)
        assert strength.win_rate == pytest.approx(100 * expit(theta), abs=1e-5)
    assert [s.rating for s in found.strengths] == sorted((s.rating for s in found.strengths), reverse=True)
    assert found.num_missing == sum(game.preference is None for game in games) > 0
    assert found.num_games + found.num_missing == len(games)


def test_ridge_is_at_the_minimum_that_scipy_finds_and_keeps_an_unbeaten_model_finite() -> None:
    games = round_robin(1) + [Game(f"q{i}", "best", "m0", True, 1.0) for i in range(9)]
    design, outcomes, weights, names = design_of(games, "m0")
    found = {s.model: s for s in bradley_terry(games, anchor="m0", ridge=0.5, bootstrap=NO_INTERVALS).strengths}
    for name, theta in zip(names, minimum(design, outcomes, weights, ridge=0.5), strict=True):
        assert found[name].rating == pytest.approx(1000 + 400 / math.log(10) * theta, abs=1e-4)
    with pytest.raises(ValueError, match="best won everything or nothing"):
        bradley_terry(games, anchor="m0")


def test_two_models_have_the_odds_of_their_games() -> None:
    # 3 weighted wins, 2 losses, 1 tie: odds 3.5 to 2.5.
    games = [Game("a", "x", "y", True, 1.0, weight=3), Game("b", "x", "y", True, 0.0), Game("c", "x", "y", False, 0.0)]
    games += [Game("d", "y", "x", True, 0.5), Game("e", "x", "y", True, None, weight=3)]
    best, anchor = bradley_terry(games, anchor="y", bootstrap=NO_INTERVALS).strengths
    assert best.rating == pytest.approx(1000 + 400 * math.log10(3.5 / 2.5), abs=1e-9)
    assert best.win_rate == pytest.approx(100 * 3.5 / 6, abs=1e-9)
    assert (anchor.rating, anchor.win_rate, best.num_games) == (1000, 50, 4)
    assert all(math.isnan(bound) for bound in best.rating_ci)


def test_the_anchor_moves_all_ratings_alike() -> None:
    games = round_robin(2)
    one = {s.model: s.rating for s in bradley_terry(games, anchor="m1", bootstrap=NO_INTERVALS).strengths}
    two = {s.model: s.rating for s in bradley_terry(games, anchor="m2", bootstrap=NO_INTERVALS).strengths}
    shifts = [one[name] - two[name] for name in one]
    assert shifts == pytest.approx([1000 - two["m1"]] * 5, abs=1e-6)


@pytest.mark.parametrize("resample", ["questions", "games"])
def test_interval_has_the_width_that_the_information_gives(resample: Literal["questions", "games"]) -> None:
    # 900 games, won half: theta's standard error is 1 / sqrt(n p (1 - p)) = 1 / 15.
    games = [Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(900)]
    found = bradley_terry(games, anchor="y", bootstrap=Bootstrap(resample, 2000, (0.025, 0.975), seed=1))
    (low, high) = next(s for s in found.strengths if s.model == "x").rating_ci
    assert (high - low) * math.log(10) / 400 == pytest.approx(2 * 1.96 / 15, rel=0.08)
    assert found.num_failed_rounds == 0


def test_resampling_questions_keeps_their_games_together() -> None:
    # Each question was judged ten times with one result: it is one observation, not ten.
    games = [Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(100) for _ in range(10)]
    widths = {}
    resamples: tuple[Literal["questions", "games"], ...] = ("questions", "games")
    for resample in resamples:
        found = bradley_terry(games, anchor="y", bootstrap=Bootstrap(resample, 400))
        low, high = next(s for s in found.strengths if s.model == "x").rating_ci
        widths[resample] = high - low
    assert widths["questions"] / widths["games"] == pytest.approx(math.sqrt(10), rel=0.15)


def test_rounds_without_a_fit_are_counted() -> None:
    # One win in four games: a round misses it with chance (3/4)^4, and the loss side as seldom.
    games = [Game(f"q{i}", "x", "y", True, float(i == 0)) for i in range(4)]
    found = bradley_terry(games, anchor="y", bootstrap=Bootstrap(num_rounds=500))
    chance = 0.75**4 + 0.25**4
    assert found.num_failed_rounds / 500 == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / 500))


def test_refuses_games_that_determine_nothing() -> None:
    games = [Game("q", "a", "b", True, 0.5), Game("q", "c", "d", True, 0.5)]
    with pytest.raises(ValueError, match="never met them"):
        bradley_terry(games, anchor="a")
    with pytest.raises(ValueError, match="anchor 'z' has no game"):
        bradley_terry(games, anchor="z")
    with pytest.raises(ValueError, match="compared with itself"):
        bradley_terry([Game("q", "a", "a", True, 0.5)], anchor="a")
    with pytest.raises(ValueError, match="preference is 2"):
        bradley_terry([Game("q", "a", "b", True, 2.0)], anchor="a")


def styled_games(seed: int, *, taste: float, edge: float) -> tuple[list[Game], dict[tuple[str, str], Style]]:
    """Models against ``base``, their verdicts from strength and from what length is worth; half of the models write much."""
    rng = np.random.default_rng(seed)
    games, styles = [], {}
    for q in range(300):
        styles[f"q{q}", "base"] = Style(int(rng.integers(100, 400)), *rng.integers(0, 5, size=3).tolist())
        for m in range(4):
            wordy = 1 if m < 2 else 0
            style = Style(int(rng.integers(100, 400) * (1 + wordy)), *rng.integers(0, 5, size=3).tolist())
            styles[f"q{q}", f"m{m}"] = style
            length = style_differences([style], [styles[f"q{q}", "base"]])[0, 0]
            for first in (True, False):
                chance = expit(edge * (m % 2) + taste * length)
                games.append(Game(f"q{q}", f"m{m}", "base", first, float(chance)))
    return games, styles


def test_style_control_recovers_strengths_that_length_hid() -> None:
    games, styles = styled_games(0, taste=3.0, edge=0.5)
    plain = {s.model: s.win_rate for s in bradley_terry(games, anchor="base", bootstrap=NO_INTERVALS).strengths}
    found = bradley_terry(games, anchor="base", styles=styles, centered=False, bootstrap=NO_INTERVALS)
    controlled = {s.model: s.win_rate for s in found.strengths}
    # Without control the wordy m0 looks better than the stronger m3; with it each model has the strength it was given.
    assert plain["m0"] > plain["m3"]
    for m in range(4):
        assert controlled[f"m{m}"] == pytest.approx(100 * expit(0.5 * (m % 2)), abs=1e-4)
    # All rows' spread turns the taste into log-odds a standard deviation.
    pairs = [(styles[game.question, game.model], styles[game.question, "base"]) for game in games]
    spread = style_differences(*zip(*pairs, strict=True))[:, 0].std(ddof=1)
    assert found.style["length"] == pytest.approx(3.0 * spread, abs=1e-6)
    assert [found.style[name] for name in ("headers", "lists", "bold")] == pytest.approx([0, 0, 0], abs=1e-6)


def test_centred_style_control_is_at_the_minimum_that_scipy_finds() -> None:
    games, styles = styled_games(3, taste=1.0, edge=0.3)
    rng = np.random.default_rng(0)
    games = [Game(g.question, g.model, g.baseline, g.model_first, float(rng.random() < (g.preference or 0))) for g in games]
    found = bradley_terry(games, anchor="base", styles=styles, bootstrap=Bootstrap(num_rounds=10))
    design, outcomes, weights, names = design_of(games, "base")
    rows = style_differences([styles[g.question, g.model] for g in games], [styles[g.question, "base"] for g in games])
    coef = minimum(np.hstack([design, (rows - rows.mean(0)) / rows.std(0, ddof=1)]), outcomes, weights)
    by_name = {s.model: s for s in found.strengths}
    for name, theta in zip(names, coef, strict=False):
        assert by_name[name].win_rate == pytest.approx(100 * expit(theta), abs=1e-4)
        assert by_name[name].win_rate_ci[0] < by_name[name].win_rate < by_name[name].win_rate_ci[1]
    assert list(found.style.values()) == pytest.approx(coef[len(names) :], abs=1e-4)


def test_style_that_never_differs_is_left_out_and_a_missing_one_is_named() -> None:
    games, styles = styled_games(1, taste=1.0, edge=0.5)
    bare = {key: Style(style.num_tokens, 0, 0, style.num_bold) for key, style in styles.items()}
    assert set(bradley_terry(games, anchor="base", styles=bare, bootstrap=NO_INTERVALS).style) == {"length", "bold"}
    del bare["q7", "m2"]
    with pytest.raises(ValueError, match="question 'q7': the style of m2's answer"):
        bradley_terry(games, anchor="base", styles=bare)


def test_verdicts_that_style_tells_apart_have_no_finite_fit() -> None:
    games = [Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(20)]
    styles = {(f"q{i}", "x"): Style(100 + 50 * (i % 2) + i, 0, 0, 0) for i in range(20)}
    styles |= {(f"q{i}", "y"): Style(100, 0, 0, 0) for i in range(20)}
    with pytest.raises(ValueError, match="don't determine finite strengths: style"):
        bradley_terry(games, anchor="y", styles=styles)
    assert bradley_terry(games, anchor="y", styles=styles, ridge=0.1, bootstrap=NO_INTERVALS).style["length"] > 0


def test_fit_is_at_the_maximum() -> None:
    rng = np.random.default_rng(0)
    design, outcomes, weights = rng.normal(size=(50, 3)), rng.uniform(size=50), rng.uniform(1, 3, size=50)
    theta = fit_bradley_terry(design, outcomes, weights, ridge=0.3)
    assert theta is not None
    gradient = design.T @ (weights * (expit(design @ theta) - outcomes)) + 0.3 * theta
    assert np.abs(gradient).max() < 1e-8


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn: pip install .*\[eval\]'"):
        bradley_terry(round_robin(0), anchor="m0")


def test_markdown_is_counted_outside_code() -> None:
    text = "# One\n### Two\n#three\n\n- a\n  * b\n+ c\n3. d\n**x** and __y__ ** z\n```\n# no\n- no\n**no**\n```\n"
    assert style_of(text, 40) == Style(40, 2, 4, 2)


def test_style_differences_by_hand_and_antisymmetric() -> None:
    ours, theirs = Style(300, 2, 0, 1), Style(99, 0, 0, 3)
    row = style_differences([ours], [theirs])[0]
    bold = (1 / 301 - 3 / 100) / (1 / 301 + 3 / 100 + 1)
    assert row == pytest.approx([201 / 399, (2 / 301) / (2 / 301 + 1), 0, bold], abs=1e-15)
    assert style_differences([theirs], [ours])[0] == pytest.approx(-row, abs=1e-15)
    assert style_differences([Style(0, 0, 0, 0)], [Style(0, 0, 0, 0)]).tolist() == [[0, 0, 0, 0]]


def test_arena_hard_score_counts_strong_verdicts_three_times() -> None:
    games = [Game("a", "x", "base", True, 1.0, weight=3, verdict="A>>B"), Game("a", "x", "base", False, 0.5)]
    games += [
        Game("b", "x", "base", True, 0.0),
        Game("b", "x", "base", False, 0.0),
        Game("c", "x", "base", True, None, weight=3),
    ]
    (score,) = arena_hard_scores(games)
    assert score.score == pytest.approx(100 * 3.5 / 6, abs=1e-12)
    assert (score.num_games, score.num_missing) == (4, 1)
    kept, dropped = complete_games(games)
    assert (len(kept), dropped) == (4, 1)


@pytest.mark.parametrize("resample", ["questions", "games"])
def test_arena_hard_rounds_centre_on_the_score(resample: Literal["questions", "games"]) -> None:
    rng = np.random.default_rng(0)
    games = [
        Game(f"q{i}", "x", "base", first, float(rng.integers(0, 3)) / 2, weight=int(rng.choice([1, 3])))
        for i in range(100)
        for first in (True, False)
    ]
    (score,) = arena_hard_scores(games, bootstrap=Bootstrap(resample, 3000))
    assert score.bootstrap_mean == pytest.approx(score.score, abs=0.3)
    assert score.ci[0] < score.score < score.ci[1]


def test_arena_hard_games_are_drawn_as_often_as_they_count() -> None:
    # One strong win and three plain losses: six rows of one weight, whose mean has the variance p(1 - p) / 6.
    games = [Game("a", "x", "base", True, 1.0, weight=3)] + [Game(f"b{i}", "x", "base", True, 0.0) for i in range(3)]
    (score,) = arena_hard_scores(games, bootstrap=Bootstrap("games", 4000, (0.16, 0.84)))
    assert score.ci == pytest.approx((100 * 2 / 6, 100 * 4 / 6), abs=1e-9)


def test_arena_hard_needs_one_baseline_and_verdicts() -> None:
    with pytest.raises(ValueError, match="one baseline is needed"):
        arena_hard_scores([Game("a", "x", "b", True, 1.0), Game("a", "x", "c", True, 1.0)])
    with pytest.raises(ValueError, match="no game with a verdict out of 1"):
        arena_hard_scores([Game("a", "x", "b", True, None)])
    with pytest.raises(ValueError, match="no games"):
        arena_hard_scores([])

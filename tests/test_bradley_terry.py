"""Bradley-Terry against scipy's minimum of the likelihood and closed forms; Arena-Hard's score; style control."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit

from ncalign.core.errors import MissingPackageError
from ncalign.stats.arena_hard import arena_hard_scores
from ncalign.stats.bradley_terry import Strength, bradley_terry
from ncalign.stats.logistic import fit_maximum
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
    found = bradley_terry(games, anchor="m0")
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
    found = {s.model: s for s in bradley_terry(games, anchor="m0", ridge=0.5).strengths}
    for name, theta in zip(names, minimum(design, outcomes, weights, ridge=0.5), strict=True):
        assert found[name].rating == pytest.approx(1000 + 400 / math.log(10) * theta, abs=1e-4)
    with pytest.raises(ValueError, match="best won everything or nothing"):
        bradley_terry(games, anchor="m0")


def test_two_models_have_the_odds_of_their_games() -> None:
    # 3 weighted wins, 2 losses, 1 tie: odds 3.5 to 2.5.
    games = [Game("a", "x", "y", True, 1.0, weight=3), Game("b", "x", "y", True, 0.0), Game("c", "x", "y", False, 0.0)]
    games += [Game("d", "y", "x", True, 0.5), Game("e", "x", "y", True, None, weight=3)]
    best, anchor = bradley_terry(games, anchor="y").strengths
    assert best.rating == pytest.approx(1000 + 400 * math.log10(3.5 / 2.5), abs=1e-9)
    assert best.win_rate == pytest.approx(100 * 3.5 / 6, abs=1e-9)
    assert (anchor.rating, anchor.win_rate, best.num_games) == (1000, 50, 4)
    assert all(math.isnan(bound) for bound in anchor.rating_ci)


def test_the_anchor_moves_all_ratings_alike() -> None:
    games = round_robin(2)
    one = {s.model: s.rating for s in bradley_terry(games, anchor="m1").strengths}
    two = {s.model: s.rating for s in bradley_terry(games, anchor="m2").strengths}
    shifts = [one[name] - two[name] for name in one]
    assert shifts == pytest.approx([1000 - two["m1"]] * 5, abs=1e-6)


def rating_of(games: list[Game], model: str) -> Strength:
    return next(s for s in bradley_terry(games, anchor="y").strengths if s.model == model)


def test_interval_has_the_width_that_the_information_gives() -> None:
    # 900 games, won half: theta's standard error is 1 / sqrt(n p (1 - p)) = 1 / 15; the jackknife's is larger by 900 / 899.
    low, high = rating_of([Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(900)], "x").rating_ci
    t = stats.t.ppf(0.975, 899)
    assert (high - low) * math.log(10) / 400 == pytest.approx(2 * t / 15 * 900 / 899, rel=1e-6)


def test_two_models_have_the_error_of_leaving_out_each_question() -> None:
    # With one game a question, 13 won of 20: leaving one out moves theta by a Newton step of (p_i - m) / ((n - 1) m (1 - m)).
    games = [Game(f"q{i}", "x", "y", True, float(i < 13)) for i in range(20)]
    m = 13 / 20
    steps = np.array([(game.preference or 0.0) - m for game in games]) / (19 * m * (1 - m))
    arm = stats.t.ppf(0.975, 19) * math.sqrt(float(steps @ steps))
    found = rating_of(games, "x")
    theta = math.log(m / (1 - m))
    assert found.win_rate_ci == pytest.approx((100 * expit(theta - arm), 100 * expit(theta + arm)), abs=1e-6)
    assert found.rating_ci == pytest.approx([1000 + 400 / math.log(10) * (theta + side * arm) for side in (-1, 1)], abs=1e-6)


def test_a_questions_games_stay_together() -> None:
    # Each question was judged ten times with one result: it is one observation, not ten.
    single = [Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(100)]
    ten = [game for game in single for _ in range(10)]
    apart = [Game(f"{game.question}/{k}", "x", "y", True, game.preference) for game in single for k in range(10)]
    assert rating_of(ten, "x").rating_ci == pytest.approx(rating_of(single, "x").rating_ci, abs=1e-6)
    widths = [high - low for low, high in (rating_of(games, "x").rating_ci for games in (ten, apart))]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.05)


def test_ties_alone_are_no_certainty() -> None:
    # Of 20 questions with both orders tied, a share of z^2 / (n + z^2) may still be decided: theta's error is sqrt of it over
    # that of 20 games of wins and losses, 2 / sqrt(20).
    games = [Game(f"q{i}", "x", "y", first, 0.5) for i in range(20) for first in (True, False)]
    low, high = rating_of(games, "x").rating_ci
    z = stats.norm.ppf(0.975)
    arm = z * math.sqrt(z**2 / (20 + z**2)) * 2 / math.sqrt(20)
    assert (high - 1000, 1000 - low) == pytest.approx([400 / math.log(10) * arm] * 2, abs=1e-6)


def test_the_anchor_has_no_interval_and_one_question_tells_none() -> None:
    found = rating_of([Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(30)], "y")
    assert all(math.isnan(bound) for bound in (*found.rating_ci, *found.win_rate_ci))
    found = rating_of([Game("q", "x", "y", first, float(first)) for first in (True, False)], "x")
    assert all(math.isnan(bound) for bound in (*found.rating_ci, *found.win_rate_ci))


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
    plain = {s.model: s.win_rate for s in bradley_terry(games, anchor="base").strengths}
    found = bradley_terry(games, anchor="base", styles=styles, centered=False)
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
    found = bradley_terry(games, anchor="base", styles=styles)
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
    assert set(bradley_terry(games, anchor="base", styles=bare).style) == {"length", "bold"}
    del bare["q7", "m2"]
    with pytest.raises(ValueError, match="question 'q7': the style of m2's answer"):
        bradley_terry(games, anchor="base", styles=bare)


def test_verdicts_that_style_tells_apart_have_no_finite_fit() -> None:
    games = [Game(f"q{i}", "x", "y", True, float(i % 2)) for i in range(20)]
    styles = {(f"q{i}", "x"): Style(100 + 50 * (i % 2) + i, 0, 0, 0) for i in range(20)}
    styles |= {(f"q{i}", "y"): Style(100, 0, 0, 0) for i in range(20)}
    with pytest.raises(ValueError, match="don't determine finite strengths: style"):
        bradley_terry(games, anchor="y", styles=styles)
    assert bradley_terry(games, anchor="y", styles=styles, ridge=0.1).style["length"] > 0


def test_fit_is_at_the_maximum() -> None:
    rng = np.random.default_rng(0)
    design, outcomes, weights = rng.normal(size=(50, 3)), rng.uniform(size=50), rng.uniform(1, 3, size=50)
    theta = fit_maximum(design, outcomes, weights, ridge=0.3)
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


def test_arena_hard_intervals_are_those_of_the_weighted_mean_of_questions() -> None:
    # Two orders of 100 questions, a strong verdict now and then: the ratio's error is that of its linear part.
    rng = np.random.default_rng(0)
    games = [
        Game(f"q{i}", "x", "base", first, float(rng.integers(0, 3)) / 2, weight=int(rng.choice([1, 3])))
        for i in range(100)
        for first in (True, False)
    ]
    (score,) = arena_hard_scores(games)
    totals, sizes = (np.array([sum(f(g) for g in games[2 * i : 2 * i + 2]) for i in range(100)]) for f in (weighted, weight))
    off = totals - sizes * score.score / 100
    width = 2 * stats.t.ppf(0.975, 99) * 100 * math.sqrt(float(off @ off) * 100 / 99) / sizes.sum()
    assert score.ci[1] - score.ci[0] == pytest.approx(width, rel=0.03)
    assert score.ci[0] < score.score < score.ci[1]


def weighted(game: Game) -> float:
    return game.weight * (game.preference or 0.0)


def weight(game: Game) -> float:
    return float(game.weight)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_arena_hard_of_one_kind_of_verdict_has_wilsons_interval(won: float) -> None:
    # 10 of 10 questions: z^2 / (n + z^2) of them may be of the other kind.
    (score,) = arena_hard_scores([Game(f"q{i}", "x", "b", first, won, weight=3) for i in range(10) for first in (True, False)])
    z = stats.norm.ppf(0.975)
    share = 100 * z**2 / (10 + z**2)
    assert score.ci == pytest.approx((100 - share, 100) if won else (0, share), abs=1e-9)


def test_arena_hard_needs_one_baseline_and_verdicts() -> None:
    with pytest.raises(ValueError, match="one baseline is needed"):
        arena_hard_scores([Game("a", "x", "b", True, 1.0), Game("a", "x", "c", True, 1.0)])
    with pytest.raises(ValueError, match="no game with a verdict out of 1"):
        arena_hard_scores([Game("a", "x", "b", True, None)])
    with pytest.raises(ValueError, match="no games"):
        arena_hard_scores([])

"""Biases of a judge towards a position or towards long answers, and the agreement of two judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ncalign.stats.intervals import NO_INTERVAL, SIGNIFICANCE, Interval, holm
from ncalign.stats.paired import paired_comparison
from ncalign.stats.preferences import mean_preferences, order_preferences
from ncalign.stats.records import Game

# Points away from 50 from which a bias is called clear, and strong.
_CLEAR, _STRONG = 5.0, 20.0
_NAN = float("nan")


@dataclass(frozen=True)
class PositionBias:
    """How a judge's verdicts depend on which answer is shown first.

    Attributes:
        first_place: mean preference for the answer shown first, in percent, over questions judged in both orders; 50 without
            bias, whichever model is better; NaN where there is no such question.
        ci: 95 % interval of ``first_place``.
        p_value: two-sided, of a sign-flip permutation test against 50; see :func:`position_bias` for few questions.
        num_pairs: questions judged in both orders.
        num_incomplete: questions with a verdict in one order alone, or in none.
        contradictions: percent of pairs in which either order prefers the other answer.
        half_contradictions: percent of pairs in which one order calls a tie and the other does not.
        biased: whether ``p_value`` is below 5 %; ``summary`` says so in words.
    """

    first_place: float
    ci: Interval
    p_value: float
    num_pairs: int
    num_incomplete: int
    contradictions: float
    half_contradictions: float
    biased: bool
    summary: str


def position_bias(games: Iterable[Game], *, seed: int = 0, num_resamples: int = 10_000) -> PositionBias:
    """Compare the two orders of each question.

    Let p be the preference for the model when it is shown first, and q when it is shown second: the answer shown first got
    ``(p + 1 - q) / 2``. A judge whose verdicts don't depend on the position has p = q, so 1/2 for every question. Where one
    position wins every game, the p-value is the smaller of the permutation test's and ``2 / 4^n``, the largest probability of
    that for an unbiased judge whose two verdicts are independent: with few questions the permutation test has no power.

    The games may be of any models, all by one judge; several of one order are averaged.

    Raises:
        ValueError: there are no games.
    """
    orders = np.array(list(order_preferences(games).values()))
    if not len(orders):
        raise ValueError("there are no games: a judge's bias needs its verdicts")
    pairs = orders[~np.isnan(orders).any(axis=1)]
    incomplete = len(orders) - len(pairs)
    if len(pairs) < 2:
        words = f"{len(pairs)} questions were judged in both orders: position bias can't be told"
        return PositionBias(_NAN, NO_INTERVAL, _NAN, len(pairs), incomplete, _NAN, _NAN, False, words)
    first_place = 50 * (pairs[:, 0] + 1 - pairs[:, 1])
    even = np.full(len(pairs), 50.0)
    test = paired_comparison(even, first_place, bounds=(0.0, 100.0), seed=seed, num_resamples=num_resamples)
    leaning = np.sign(pairs - 0.5)
    product = leaning[:, 0] * leaning[:, 1]
    half = (product == 0) & (np.abs(leaning).sum(axis=1) == 1)
    p_value = test.p_value
    if bool((product < 0).all()) and len(set(leaning[:, 0])) == 1:
        p_value = min(p_value, 2 * 0.25 ** len(pairs))
    biased = p_value < SIGNIFICANCE
    return PositionBias(
        first_place=test.mean_after,
        ci=test.ci_after,
        p_value=p_value,
        num_pairs=len(pairs),
        num_incomplete=incomplete,
        contradictions=100 * float((product < 0).mean()),
        half_contradictions=100 * float(half.mean()),
        biased=biased,
        summary=_position_words(test.mean_after, test.ci_after, biased),
    )


def _position_words(first_place: float, ci: Interval, biased: bool) -> str:
    numbers = f"{first_place:.1f} % (95 % interval {ci[0]:.1f} to {ci[1]:.1f})"
    if not biased:
        return f"no position bias found: the answer shown first gets {numbers}"
    distance = abs(first_place - 50)
    size = "slightly" if distance < _CLEAR else "clearly" if distance < _STRONG else "strongly"
    place = "first" if first_place > 50 else "second"
    return f"{size} position-biased: the judge prefers the answer shown {place}; the answer shown first gets {numbers}"


@dataclass(frozen=True)
class LengthBias:
    """How a judge's verdicts depend on the answers' lengths.

    Attributes:
        correlation: Pearson's, of the preference with the difference in length; NaN where either is constant.
        rank_correlation: Spearman's.
        rank_p_value: two-sided, of the rank correlation alone.
        longer_preferred: percent of decided questions with answers of different lengths won by the longer one;
            NaN where there are none.
        longer_p_value: two-sided, of a binomial test of ``longer_preferred`` against 50 alone; NaN likewise.
        p_value: of both tests together: the smaller of the two, by Holm's correction.
        related: whether ``p_value`` is below 5 %; ``summary`` says so in words.
        num_counted: questions with a verdict; ``num_missing`` have none.
    """

    correlation: float
    rank_correlation: float
    rank_p_value: float
    longer_preferred: float
    longer_p_value: float
    p_value: float
    related: bool
    summary: str
    num_counted: int
    num_missing: int


def length_bias(games: Iterable[Game], lengths: Mapping[tuple[str, str], int]) -> LengthBias:
    """Correlate each question's mean preference with how much longer the model's answer is.

    Longer answers may be better ones: this is a correlation. The length-controlled win rate says what is left without length.
    The games are all by one judge; ``lengths`` has each answer's, by question and model.

    Raises:
        ValueError: an answer's length is missing.
    """
    means = mean_preferences(games, lambda game: (game.question, game.model, game.baseline))
    for question, *pair in means:
        for name in pair:
            if (question, name) not in lengths:
                raise ValueError(f"question {question!r}: the length of {name}'s answer is not known")
    differences = [lengths[question, model] - lengths[question, baseline] for question, model, baseline in means]
    preferences = np.array(list(means.values()), dtype=np.float64)
    judged = ~np.isnan(preferences)
    longer, wins = np.array(differences, dtype=np.float64)[judged], preferences[judged]
    correlation = rank = rank_p_value = _NAN
    if len(wins) > 2 and np.ptp(longer) > 0 and np.ptp(wins) > 0:
        correlation = float(stats.pearsonr(longer, wins).statistic)
        ranks = stats.spearmanr(longer, wins)
        rank, rank_p_value = float(ranks.statistic), float(ranks.pvalue)
    decided = (longer != 0) & (wins != 0.5)
    num_longer, num_decided = int((np.where(longer > 0, wins, 1 - wins)[decided] > 0.5).sum()), int(decided.sum())
    share = 100 * num_longer / num_decided if num_decided else _NAN
    longer_p_value = float(stats.binomtest(num_longer, num_decided).pvalue) if num_decided else _NAN
    p_value = min((p for p in holm([rank_p_value, longer_p_value]) if not np.isnan(p)), default=_NAN)
    return LengthBias(
        correlation=correlation,
        rank_correlation=rank,
        rank_p_value=rank_p_value,
        longer_preferred=share,
        longer_p_value=longer_p_value,
        p_value=p_value,
        related=p_value < SIGNIFICANCE,
        summary=_length_words(share, rank, num_decided, p_value < SIGNIFICANCE),
        num_counted=len(wins),
        num_missing=len(means) - len(wins),
    )


def _length_words(share: float, rank: float, num_decided: int, related: bool) -> str:
    if not num_decided:
        return "no verdict on answers of different lengths: length bias can't be told"
    correlated = f", rank correlation {rank:.2f}" if np.isfinite(rank) else ""
    numbers = f"the longer answer wins {share:.1f} % of {num_decided} decided questions{correlated}"
    if not related:
        return f"verdicts don't go with length: {numbers}"
    return f"verdicts go with length: {numbers}; read the length-controlled win rate beside the plain one"


@dataclass(frozen=True)
class Agreement:
    """How far two judges give the same verdicts.

    Attributes:
        agreement: percent of common games with the same verdict of win, tie and loss.
        agreement_without_ties: percent of those games that neither calls a tie; NaN where there are none.
        kappa: Cohen's, agreement beyond chance; NaN where both give one and the same verdict throughout.
        correlation: Pearson's, of the preferences; NaN where either is constant.
        num_counted: games with a verdict of both.
        num_missing: common games that lack the verdict of either.
        num_unmatched: games that only one judge was asked.
    """

    agreement: float
    agreement_without_ties: float
    kappa: float
    correlation: float
    num_counted: int
    num_missing: int
    num_unmatched: int


def judge_agreement(one: Iterable[Game], other: Iterable[Game]) -> Agreement:
    """Compare two judges on the games both were asked: same question, models and order.

    Kappa is ``(a - c) / (1 - c)``, with a the agreement and c the agreement by chance of two judges who give wins, ties and
    losses as often as these. Games that were judged several times are averaged.

    Raises:
        ValueError: the judges have no game in common with a verdict of both.
    """
    first, second = (
        mean_preferences(games, lambda game: (game.question, game.model, game.baseline, game.model_first))
        for games in (one, other)
    )
    common = sorted(first.keys() & second.keys())
    both = np.array([(first[key], second[key]) for key in common], dtype=np.float64).reshape(-1, 2)
    values = both[~np.isnan(both).any(axis=1)]
    if not len(values):
        raise ValueError(f"the judges have {len(common)} games in common and none with a verdict of both: nothing to compare")
    signs = np.sign(values - 0.5).astype(int)
    same = signs[:, 0] == signs[:, 1]
    habits = [Counter(column.tolist()) for column in signs.T]
    chance = sum(habits[0][verdict] * habits[1][verdict] for verdict in habits[0]) / len(values) ** 2
    decided = (signs != 0).all(axis=1)
    varied = bool((values.max(axis=0) > values.min(axis=0)).all())
    return Agreement(
        agreement=100 * float(same.mean()),
        agreement_without_ties=100 * float(same[decided].mean()) if decided.any() else _NAN,
        kappa=(float(same.mean()) - chance) / (1 - chance) if chance < 1 else _NAN,
        correlation=float(stats.pearsonr(values[:, 0], values[:, 1]).statistic) if varied else _NAN,
        num_counted=len(values),
        num_missing=len(common) - len(values),
        num_unmatched=len(first.keys() ^ second.keys()),
    )

"""The steps of `ncalign adjust`: how each is written, what it is fitted to, and how it changes a group's rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from ncalign.adjust import transforms
from ncalign.adjust.fits import QUANTILE_SAMPLE, LengthSlope, PairwiseLength, RewardSample
from ncalign.adjust.transforms import GROUP_TRANSFORMS, UNITS, Unit
from ncalign.core.errors import ConfigError, DataError, names, nearest, shown
from ncalign.data.groups import Group

Read: TypeAlias = Callable[[], Iterator[Group]]
"""Opens one more pass over the groups as they are before a step."""

MERGE = "merge"
_FORMS = {
    "zscore": "zscore",
    "rank": "rank",
    "dense_rank": "dense_rank",
    "quantile": "quantile",
    "clip": "clip:LOW:HIGH",
    "scale": "scale:FACTOR",
    "length": "length[:words|characters|log_words]",
    "length_glm": "length_glm[:characters|words|log_words]",
    "aspects": "aspects[:NAME[=WEIGHT]]...",
    MERGE: "merge",
}
_PER: dict[Unit, str] = {"words": "a word", "characters": "a character", "log_words": "a unit of ln(1 + words)"}
_MAX_ASPECTS = 1000


class Fitted(NamedTuple):
    """A step after its fit to the data.

    Attributes:
        note: a description, for ``metadata["reward_steps"]``.
        apply: a group's new rewards.
    """

    note: str
    apply: Callable[[Group], list[float | None]]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: the first word of what was written.
        fit: from passes over the groups and a seed.
        check: gives the group back, or raises where the step can't use it; None: it can use any.
    """

    name: str
    fit: Callable[[Read, int], Fitted]
    check: Callable[[Group], Group] | None = None


def parse_steps(spellings: Sequence[str]) -> list[Step]:
    """The steps that were written.

    Raises:
        ConfigError: with every one that can't be read.
    """
    steps: list[Step] = []
    problems: list[str] = []
    for spelling in spellings:
        try:
            steps.append(_parse(spelling))
        except ValueError as error:
            problems.append(f"steps: {error}")
    if [step.name for step in steps].count(MERGE) > 1:
        problems.append("steps: merge stands there twice: files are merged once, so keep one")
    if problems:
        raise ConfigError(problems)
    return steps


def _parse(spelling: str) -> Step:
    name, *arguments = spelling.split(":")
    if name not in _FORMS and name not in GROUP_TRANSFORMS:
        if "=" in name:
            raise ValueError(
                f"unknown step {spelling!r}; weights of aspects are joined by colons, since a comma ends a step: "
                "aspects:helpfulness=2:honesty=1"
            )
        guess = nearest(name, _FORMS)
        hint = f"did you mean {guess!r}?" if guess else f"known are {', '.join(_FORMS.values())}"
        raise ValueError(f"unknown step {spelling!r}; {hint}")
    if name in (*GROUP_TRANSFORMS, "quantile", MERGE) and arguments:
        raise ValueError(f"{spelling!r}: {name} takes nothing after it")
    if name == "clip":
        return _clip(spelling, _numbers(spelling, arguments, 2))
    if name == "scale":
        return _scale(spelling, _numbers(spelling, arguments, 1))
    if name == "length":
        return Step(name, partial(_fit_length, _unit(spelling, arguments, "words")))
    if name == "length_glm":
        return Step(name, partial(_fit_length_glm, _unit(spelling, arguments, "characters")), _check_shares)
    if name == "aspects":
        return Step(name, partial(_fit_aspects, spelling, _weights(spelling, arguments)), _check_aspects)
    if name == "quantile":
        return Step(name, _fit_quantile)
    if name == MERGE:
        # The verb joins the files here: the step itself changes no rewards.
        return _known(name, MERGE, rewards_of)
    transform, note = GROUP_TRANSFORMS[name], "zscore" if name == "z_score" else name
    return _known(name, note, lambda group: transforms.within_group(rewards_of(group), transform))


def _known(name: str, note: str, apply: Callable[[Group], list[float | None]]) -> Step:
    """A step that needs nothing from the data set."""
    fitted = Fitted(note, apply)
    return Step(name, lambda read, seed: fitted)


def rewards_of(group: Group) -> list[float | None]:
    """The rewards as they are."""
    return [candidate.reward for candidate in group.candidates]


# --- What is written after a step's name ------------------------------------------------------------------------------


def _number(spelling: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{spelling!r}: found {text!r}; a finite number is needed")
    return number


def _numbers(spelling: str, arguments: Sequence[str], count: int) -> list[float]:
    name = spelling.partition(":")[0]
    if len(arguments) != count:
        raise ValueError(f"{spelling!r}: {_FORMS[name]} is needed, for instance {'clip:-3:3' if count == 2 else 'scale:-1'}")
    return [_number(spelling, text) for text in arguments]


def _unit(spelling: str, arguments: Sequence[str], default: Unit) -> Unit:
    if not arguments:
        return default
    unit = next((unit for unit in UNITS if [unit] == list(arguments)), None)
    if unit is None:
        guess = nearest(arguments[0], UNITS) if len(arguments) == 1 else None
        hint = f"did you mean {guess!r}?" if guess else f"length is counted in one of {', '.join(UNITS)}"
        raise ValueError(f"{spelling!r}: found {':'.join(arguments)!r}; {hint}")
    return unit


def _weights(spelling: str, arguments: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        weight = _number(spelling, text) if equals else 1.0
        if not name or name in weights:
            raise ValueError(f"{spelling!r}: {f'{name} stands there twice' if name else 'an aspect has no name'}; mend it")
        if weight <= 0:
            raise ValueError(f"{spelling!r}: {name} has weight {weight:g}; a weight must be above 0, so leave the aspect out")
        weights[name] = weight
    return weights


# --- Steps ------------------------------------------------------------------------------------------------------------


def _clip(spelling: str, limits: Sequence[float]) -> Step:
    low, high = limits
    if low >= high:
        raise ValueError(f"{spelling!r}: the lower limit, {low:g}, must be less than the upper, {high:g}")
    return _known("clip", f"clip: {low:g} to {high:g}", lambda group: transforms.clipped(rewards_of(group), low, high))


def _scale(spelling: str, factors: Sequence[float]) -> Step:
    (factor,) = factors
    if factor == 0:
        raise ValueError(f"{spelling!r}: a factor of 0 makes all rewards equal; another is needed")
    return _known("scale", f"scale: times {factor:g}", lambda group: transforms.scaled(rewards_of(group), factor))


def _fit_quantile(read: Read, seed: int) -> Fitted:
    sample = RewardSample(QUANTILE_SAMPLE, seed)
    for group in read():
        sample.add(rewards_of(group))
    among = sample.ordered()
    drawn = f"{len(among)} drawn from the {sample.num_seen}" if len(among) < sample.num_seen else f"the {len(among)}"
    return Fitted(f"quantile: place among {drawn} rewards", lambda group: transforms.quantiles(rewards_of(group), among))


def lengths_of(group: Group, unit: Unit) -> list[float]:
    """The candidates' lengths."""
    return [transforms.text_length(transforms.text_of(candidate.completion), unit) for candidate in group.candidates]


def _fit_slope(read: Read, unit: Unit) -> LengthSlope:
    regression = LengthSlope()
    for group in read():
        regression.add(rewards_of(group), lengths_of(group, unit))
    return regression


def _fit_length(unit: Unit, read: Read, seed: int) -> Fitted:
    slope = _fit_slope(read, unit).slope
    if slope is None:
        return Fitted("length: nothing to remove, since no lengths differ within a group", rewards_of)
    return Fitted(
        f"length: {slope:.4g} {_PER[unit]}, removed",
        lambda group: transforms.without_length(rewards_of(group), lengths_of(group, unit), slope),
    )


def _fit_length_glm(unit: Unit, read: Read, seed: int) -> Fitted:
    scale = _fit_slope(read, unit).spread
    if scale == 0:
        return Fitted("length_glm: nothing to remove, since no lengths differ within a group", rewards_of)
    pairs = PairwiseLength(scale)
    for group in read():
        pairs.add(rewards_of(group), lengths_of(group, unit), [candidate.source for candidate in group.candidates])
    if not pairs.num_movable:
        raise DataError(
            "steps: length_glm: every reward is 0 or 1, which no change of log-odds moves: put `quantile` before it, or "
            "use `length`"
        )
    phi = pairs.phi()
    if phi is None:
        raise DataError(
            "steps: length_glm: length alone decides every preference, or no two rewards can be compared: its coefficient "
            "can't be told from infinity; use `length`"
        )
    beside = f", beside the qualities of {pairs.num_sources} sources" if pairs.num_sources > 1 else ""
    return Fitted(
        f"length_glm: phi {phi:.4g} of tanh(length / {scale:.4g} {unit}){beside}, removed",
        lambda group: transforms.without_length_odds(rewards_of(group), lengths_of(group, unit), phi, scale),
    )


def _check_shares(group: Group) -> Group:
    for index, reward in enumerate(rewards_of(group)):
        if reward is not None and not 0 <= reward <= 1:
            raise DataError(
                f"candidates[{index}] has reward {reward:g}: length_glm needs rewards from 0 to 1, as chances to be preferred; "
                "put `quantile` or `rank` before it, or use `length`",
                reason="reward outside [0, 1]",
            )
    return group


def _fit_aspects(spelling: str, weights: dict[str, float], read: Read, seed: int) -> Fitted:
    found: dict[str, None] = {}
    for group in read():
        found |= dict.fromkeys(aspects_of(group))
        # Once all named aspects are found the search can stop; without names, all aspects are wanted.
        if (weights and weights.keys() <= found.keys()) or len(found) > _MAX_ASPECTS:
            break
    lacking = [name for name in weights if name not in found]
    if lacking or not found:
        guess = nearest(lacking[0], found) if lacking else None
        hint = f"did you mean `{guess}`?" if guess else f"there are {names(found) or 'none'} in metadata.aspects"
        raise DataError(f"steps: {spelling}: no group has the aspect {names(lacking) or 'wanted'}: {hint}")
    chosen = weights or dict.fromkeys(sorted(found), 1.0)
    note = ", ".join(f"{name}={weight:g}" for name, weight in chosen.items())
    return Fitted(
        f"aspects: {note}",
        lambda group: transforms.weighted_aspects(aspects_of(group), chosen, len(group.candidates)),
    )


def _check_aspects(group: Group) -> Group:
    aspects_of(group)
    return group


def aspects_of(group: Group) -> dict[str, list[float | None]]:
    """``metadata["aspects"]``: for each aspect a list with a number or null for each candidate; empty where it is missing.

    Raises:
        ValueError: it has another form.
    """
    found = group.metadata.get("aspects", {})
    if not isinstance(found, dict):
        raise DataError(f"metadata.aspects is {shown(found)}: an object with a list for each aspect is needed")
    for name, values in found.items():
        if not isinstance(values, list) or len(values) != len(group.candidates):
            raise DataError(
                f"metadata.aspects.{name} is {shown(values)}: a list with one entry for each of the {len(group.candidates)} "
                "candidates is needed",
                reason="wrong length",
            )
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise DataError(
                    f"metadata.aspects.{name} holds {shown(value)}: numbers or null are needed", reason="wrong type"
                )
    return found

"""The steps of `ncalign adjust`: how each is written, what it is fitted to, and how it changes a group's rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from ncalign.adjust import transforms
from ncalign.adjust.fits import QUANTILE_SAMPLE, PairwiseLength, length_slope, reward_sample
from ncalign.adjust.transforms import UNITS, Unit
from ncalign.core.errors import ConfigError, DataError, names, nearest, shown
from ncalign.data.groups import Group

Read: TypeAlias = Callable[[], Iterator[Group]]
"""Opens one more pass over the groups as they are before a step."""

MERGE = "merge"
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
    name = {"z_score": "zscore"}.get(name, name)  # what objectives call it
    if name in _STEPS:
        form, made = _STEPS[name]
        if form == name and arguments:
            raise ValueError(f"{spelling!r}: {name} takes nothing after it")
        return made(spelling, arguments)
    if "=" in name:
        raise ValueError(
            f"unknown step {spelling!r}; weights of aspects are joined by colons, since a comma ends a step: "
            "aspects:helpfulness=2:honesty=1"
        )
    guess = nearest(name, _STEPS)
    hint = f"did you mean {guess!r}?" if guess else f"known are {', '.join(form for form, _ in _STEPS.values())}"
    raise ValueError(f"unknown step {spelling!r}; {hint}")


def _without_fit(name: str, note: str, apply: Callable[[Group], list[float | None]]) -> Step:
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


def _numbers(spelling: str, arguments: Sequence[str], count: int, example: str) -> list[float]:
    if len(arguments) != count:
        raise ValueError(f"{spelling!r}: {_STEPS[spelling.partition(':')[0]][0]} is needed, for instance {example}")
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
            raise ValueError(f"{spelling!r}: {f'{name} stands there twice' if name else 'an aspect has no name'}; fix it")
        if weight <= 0:
            raise ValueError(f"{spelling!r}: {name} has weight {weight:g}; a weight must be above 0, so leave the aspect out")
        weights[name] = weight
    return weights


# --- Steps ------------------------------------------------------------------------------------------------------------


def _clip(spelling: str, arguments: Sequence[str]) -> Step:
    low, high = _numbers(spelling, arguments, 2, "clip:-3:3")
    if low >= high:
        raise ValueError(f"{spelling!r}: the lower limit, {low:g}, must be less than the upper, {high:g}")
    return _without_fit("clip", f"clip: {low:g} to {high:g}", lambda group: transforms.clipped(rewards_of(group), low, high))


def _scale(spelling: str, arguments: Sequence[str]) -> Step:
    [factor] = _numbers(spelling, arguments, 1, "scale:-1")
    if factor == 0:
        raise ValueError(f"{spelling!r}: a factor of 0 makes all rewards equal; another is needed")
    return _without_fit("scale", f"scale: times {factor:g}", lambda group: transforms.scaled(rewards_of(group), factor))


def _within_group(name: str, *_: object) -> Step:
    transform = transforms.GROUP_TRANSFORMS[name]
    return _without_fit(name, name, lambda group: transforms.within_group(rewards_of(group), transform))


def _fit_quantile(read: Read, seed: int) -> Fitted:
    among, seen = reward_sample(map(rewards_of, read()), QUANTILE_SAMPLE, seed)
    drawn = f"{len(among)} drawn from the {seen}" if len(among) < seen else f"the {len(among)}"
    return Fitted(f"quantile: place among {drawn} rewards", lambda group: transforms.quantiles(rewards_of(group), among))


def lengths_of(group: Group, unit: Unit) -> list[float]:
    """The candidates' lengths; of a conversation, that of the text of its turns."""
    completions = [candidate.completion for candidate in group.candidates]
    texts = [one if isinstance(one, str) else "\n".join(turn["content"] for turn in one) for one in completions]
    return [transforms.text_length(text, unit) for text in texts]


def _fit_length(unit: Unit, read: Read, seed: int) -> Fitted:
    slope, _ = length_slope((rewards_of(group), lengths_of(group, unit)) for group in read())
    if slope is None:
        return Fitted("length: nothing to remove, since no lengths differ within a group", rewards_of)
    return Fitted(
        f"length: {slope:.4g} {_PER[unit]}, removed",
        lambda group: transforms.without_length(rewards_of(group), lengths_of(group, unit), slope),
    )


def _fit_length_glm(unit: Unit, read: Read, seed: int) -> Fitted:
    _, scale = length_slope((rewards_of(group), lengths_of(group, unit)) for group in read())
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


_STEPS: Mapping[str, tuple[str, Callable[[str, Sequence[str]], Step]]] = {
    **{name: (name, partial(_within_group, name)) for name in transforms.GROUP_TRANSFORMS},
    "quantile": ("quantile", lambda *_: Step("quantile", _fit_quantile)),
    "clip": ("clip:LOW:HIGH", _clip),
    "scale": ("scale:FACTOR", _scale),
    "length": (
        "length[:words|characters|log_words]",
        lambda spelling, arguments: Step("length", partial(_fit_length, _unit(spelling, arguments, "words"))),
    ),
    "length_glm": (
        "length_glm[:characters|words|log_words]",
        lambda spelling, arguments: Step(
            "length_glm", partial(_fit_length_glm, _unit(spelling, arguments, "characters")), _check_shares
        ),
    ),
    "aspects": (
        "aspects[:NAME[=WEIGHT]]...",
        lambda spelling, arguments: Step(
            "aspects", partial(_fit_aspects, spelling, _weights(spelling, arguments)), _check_aspects
        ),
    ),
    # The verb joins the files here: the step itself changes no rewards.
    MERGE: (MERGE, lambda *_: _without_fit(MERGE, MERGE, rewards_of)),
}
"""For each step, how it is written and what makes it of that."""

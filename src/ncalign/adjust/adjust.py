"""`ncalign adjust`: new rewards computed from those in the groups, with a record of how."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from ncalign.adjust.config import AdjustConfig
from ncalign.adjust.merging import RewardIndex
from ncalign.adjust.steps import MERGE, Fitted, Step, parse_steps, rewards_of
from ncalign.core.errors import DataError
from ncalign.core.outputs import claim
from ncalign.core.progress import Bar, say
from ncalign.data.config import OnBadRow, SchemaChoice
from ncalign.data.groups import (
    REWARD_STEPS,
    Group,
    ReadReport,
    check_output,
    read_groups,
    recorded_steps,
    rewards_origin,
    write_groups,
)
from ncalign.rewards.base import combined, where
from ncalign.rewards.score import ScoreCounts

Opened: TypeAlias = Callable[[ReadReport], Iterator[Group]]
"""Opens one more pass over the groups and counts those left out in the report."""


def run_adjust(config: AdjustConfig) -> dict[str, object]:
    """Adjust the rewards of a file's groups and write them.

    The file is read once, and once or twice more for each step that is fitted to the whole data set (quantile, length,
    length_glm): memory does not grow with the number of groups.

    Returns:
        ``output``, counts as :func:`run_score` has them, and ``steps``, what was done.

    Raises:
        ConfigError: a step that can't be read.
        ValueError: data that can't be read, that a step can't use, or that don't match in a merge; nothing is written.
    """
    steps = parse_steps(config.steps)
    inputs = {"input": config.input, "merge": config.merge}
    claim(config.output, verb="adjust", inputs=inputs, overwrite=config.overwrite)
    check_output(config.output)
    at = next((index for index, step in enumerate(steps) if step.name == MERGE), 0)
    # The verb joins the files itself, where the step stands, or first.
    before, after = steps[:at], [step for step in steps[at:] if step.name != MERGE]
    report, counts = ReadReport(), ScoreCounts()
    on_bad_row = config.on_bad_row
    fit = partial(fit_steps, seed=config.seed, on_bad_row=on_bad_row)
    originals = partial(_originals, schema=config.schema_name, on_bad_row=on_bad_row, join_rows=config.join_rows)
    indices: list[RewardIndex] = []
    with ExitStack() as stack:
        opened, notes = fit(before, partial(originals, config.input))
        if config.merge:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ncalign-adjust-")))
            for number, path in enumerate(config.merge):
                indices.append(stack.enter_context(closing(RewardIndex(folder / f"{number}.sqlite", path))))
                other = ReadReport()
                indices[-1].fill(fit(before, partial(originals, path))[0](other))
                if notice := other.notice(path):
                    say(notice)
            join = partial(_joined, indices, config.merge_with, config.merge_weights)
            opened = partial(_changed, opened, join, on_bad_row)
            notes.append(_merge_note(config.merge_with, config.merge_weights, (Path(path).name for path in config.merge)))
        opened, more = fit(after, opened)
        groups = _all_taken(opened(report), indices, config.input, on_bad_row)
        with Bar("Adjusting groups", None) as bar:
            write_groups(_counted(groups, config.input, report, counts, bar), config.output)
        if notice := report.notice(config.input):
            say(notice)
    return {
        "output": str(config.output),
        "steps": [*notes, *more],
        **counts.result(),
        "rows_skipped": report.skipped,
    }


def _counted(groups: Iterable[Group], label: str, report: ReadReport, counts: ScoreCounts, bar: Bar) -> Iterator[Group]:
    """The groups, counted as they pass; none at all is an error."""
    for group in groups:
        counts.add(group)
        yield group
        bar.advance()
    if not counts.groups:
        examples = "".join(f"\n  {example}" for example in report.examples)
        raise DataError(f"{label}: no group to write: {report.summary()}{examples}", reason="no groups")


def fit_steps(steps: Sequence[Step], opened: Opened, *, seed: int, on_bad_row: OnBadRow) -> tuple[Opened, list[str]]:
    """Fit each step to the groups as the steps before it leave them.

    Returns:
        A function that opens a pass over the groups after the last step, and a note of what each step does.
    """
    notes = []
    for step in steps:
        usable: Opened = opened if step.check is None else partial(_changed, opened, step.check, on_bad_row)
        fitted = step.fit(partial(usable, ReadReport()), seed)
        opened = partial(_changed, usable, partial(_applied, fitted), on_bad_row)
        notes.append(fitted.note)
    return opened, notes


def _originals(
    path: str, report: ReadReport, *, schema: SchemaChoice, on_bad_row: OnBadRow, join_rows: bool
) -> Iterator[Group]:
    """The groups as they are in a file, each with a record of where its rewards came from."""
    groups = read_groups(path, schema=schema, on_bad_row=on_bad_row, report=report, join_rows=join_rows)

    def begun(group: Group) -> Group:
        steps = recorded_steps(group) or (rewards_origin(path, report.schema),)
        return replace(group, metadata={**group.metadata, REWARD_STEPS: list(steps)})

    return _changed(lambda _: groups, begun, on_bad_row, report)


def _changed(opened: Opened, change: Callable[[Group], Group], on_bad_row: OnBadRow, report: ReadReport) -> Iterator[Group]:
    """The groups after a change; where it fails, an error, or the group is left out and counted."""
    for group in opened(report):
        try:
            changed = change(group)
        except DataError as error:
            located = error.within(where(group))
            if on_bad_row == "error":
                text = f"{located}. Fix it, or leave such groups out with `on_bad_row: skip`"
                raise DataError(text, reason=error.reason) from error
            report.groups -= 1
            report.skip(located)
            continue
        yield changed


def _applied(fitted: Fitted, group: Group) -> Group:
    try:
        return with_rewards(group, fitted.apply(group), fitted.note)
    except DataError as error:
        raise error.within(f"step {fitted.note!r}") from None


def with_rewards(group: Group, rewards: Sequence[float | None], note: str) -> Group:
    """The group with new rewards; a note of what was done is appended to its record."""
    candidates = [replace(candidate, reward=reward) for candidate, reward in zip(group.candidates, rewards, strict=True)]
    return replace(group, candidates=candidates, metadata={**group.metadata, REWARD_STEPS: [*recorded_steps(group), note]})


# --- Several files ----------------------------------------------------------------------------------------------------


def _joined(indices: Sequence[RewardIndex], how: str, weights: Sequence[float], group: Group) -> Group:
    """The group with one reward made of those of several files."""
    found = [index.take(group) for index in indices]
    rewards = combined([rewards_of(group), *(taken for taken, _ in found)], how, weights)
    others = [f"{Path(index.label).name} ({'; '.join(steps)})" for index, (_, steps) in zip(indices, found, strict=True)]
    return with_rewards(group, rewards, _merge_note(how, weights, others))


def _merge_note(how: str, weights: Sequence[float], others: Iterable[str]) -> str:
    numbers = "".join(f"{',' if place else ''} {weight:g}" for place, weight in enumerate(weights))
    return f"merge: {how}{numbers} with {', '.join(others)}"


def _all_taken(groups: Iterable[Group], indices: Sequence[RewardIndex], label: str, on_bad_row: OnBadRow) -> Iterator[Group]:
    """The groups; at their end, before the output replaces a file, raises where another file has groups that matched none."""
    yield from groups
    for index in indices:
        count, first = index.left()
        if not count:
            continue
        text = f"{index.label}: {count} of its groups are not in {label}, the first {first}"
        if on_bad_row == "error":
            raise DataError(
                f"{text}: files to merge hold the same groups. Fix it, or leave such groups out with `on_bad_row: skip`"
            )
        say(f"note: {text}: left out")

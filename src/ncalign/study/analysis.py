"""From the runs' measures to arms' means, differences with intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ncalign.core.json import json_ready
from ncalign.report.tables import Column, Table, columns
from ncalign.stats.crossed import CrossedMean, crossed_mean, seeds_needed, verdict
from ncalign.stats.intervals import holm
from ncalign.study.config import BEFORE, OF_PAIRS
from ncalign.study.measure import Values
from ncalign.study.spec import Claim, Study
from ncalign.study.win_rates import EVEN, Wins

Found: TypeAlias = Mapping[tuple[str, int], Mapping[str, Values]]
"""Measures of the runs that have them, by arm and seed."""
CAPTION = "Differences are paired by seed and held-out prompt; 95 % intervals allow for both being samples"
_TOO_FEW = "no seed was finished in both arms"


@dataclass(frozen=True)
class Arranged:
    """Values of one arm, or differences of two, in a table of seeds and prompts.

    Attributes:
        values: ``[S, P]``.
        seeds: of the rows.
        left_out: prompts that lack a value in one of the runs.
    """

    values: Float[NDArray[np.float64], "S P"]
    seeds: tuple[int, ...]
    left_out: int


def arranged(found: Found, arm: str, measure: str, *, minus: str | None = None) -> Arranged | None:
    """An arm's values of a measure, or what it has more than another arm, for all seeds and prompts that have them.

    None where there is no such seed or prompt.
    """
    arms = [arm] if minus is None else [arm, minus]
    seeds = sorted({seed for one, seed in found if one == arm})
    seeds = [seed for seed in seeds if all(found.get((one, seed), {}).get(measure) for one in arms)]
    return _table([{seed: found[one, seed][measure] for seed in seeds} for one in arms])


def _table(values: Sequence[Mapping[int, Values]]) -> Arranged | None:
    """The first arm's values, or what it has more than the second's, of the same seeds."""
    seeds = tuple(values[0])
    every = [arm[seed] for arm in values for seed in seeds]
    if not every:
        return None
    prompts = [name for name in every[0] if all(math.isfinite(one.get(name, math.nan)) for one in every)]
    left_out = len(set().union(*every)) - len(prompts)
    if not prompts:
        return None
    first, *others = (np.array([[arm[seed][name] for name in prompts] for seed in seeds]) for arm in values)
    return Arranged(first - others[0] if others else first, seeds, left_out)


def _compared(found: Found, wins: Wins, claim: Claim) -> Arranged | None:
    """Differences of a claim's arms; of a win rate what it is above an even one."""
    if claim.measure not in OF_PAIRS:
        return arranged(found, claim.better, claim.measure, minus=claim.worse)
    table = _table([wins[claim.better, claim.worse]])
    return None if table is None else replace(table, values=table.values - EVEN)


def arm_means(study: Study, found: Found, wins: Wins) -> list[dict[str, Any]]:
    """The mean of each measure in each arm, with its interval; a win rate is that against the starting model."""
    rows = []
    for arm in study.file.arms:
        for measure in study.measures:
            against = wins.get((arm, BEFORE), {})
            values = _table([against]) if measure in OF_PAIRS else arranged(found, arm, measure)
            if values is not None:
                mean = crossed_mean(values.values)
                rows.append({"arm": arm, "measure": measure, **_mean_row(mean), "prompts_left_out": values.left_out})
    return rows


def comparisons(study: Study, found: Found, wins: Wins) -> list[dict[str, Any]]:
    """Each claim with its effect, interval, p-values and verdict; p-values are corrected for the number of claims (Holm)."""
    tables = [_compared(found, wins, claim) for claim in study.claims]
    means = [None if table is None else crossed_mean(table.values) for table in tables]
    corrected = holm([math.nan if mean is None else mean.p_value for mean in means])
    rows = []
    for claim, table, mean, p_value in zip(study.claims, tables, means, corrected, strict=True):
        row: dict[str, Any] = {"claim": claim.text(), "better": claim.better, "worse": claim.worse, "measure": claim.measure}
        if table is None or mean is None:
            rows.append({**row, "verdict": "undecided", "why": _TOO_FEW, "num_seeds": 0})
            continue
        decided = verdict(mean, p_value=p_value)
        row |= {**_mean_row(mean), "p_value": mean.p_value, "p_holm": p_value, "p_sign_flip": mean.p_sign_flip}
        row |= {"verdict": decided, "why": "" if decided != "undecided" else _why(mean), "prompts_left_out": table.left_out}
        rows.append(json_ready(row))
    return rows


def _mean_row(mean: CrossedMean) -> dict[str, Any]:
    return {
        "mean": mean.mean,
        "interval": json_ready(mean.ci),
        "num_seeds": mean.num_seeds,
        "num_prompts": mean.num_prompts,
        "variance": {"seeds": mean.of_seeds, "prompts": mean.of_prompts, "noise": mean.of_noise},
    }


def _why(mean: CrossedMean) -> str:
    """What would decide it."""
    if mean.num_seeds < 2:
        return "one seed can't tell"
    if mean.mean == 0:
        return "no difference was seen"
    number = seeds_needed(mean)
    if number is None:
        return "more held-out prompts are needed, or the difference is too small to matter"
    return f"{number} seeds would tell a difference as large as this one"


def claims_table(rows: Sequence[Mapping[str, Any]], *, caption: str, why: bool = True) -> Table:
    """The comparisons as a table; its verdicts stand where a narrow screen shows them.

    Args:
        rows: of :func:`comparisons`.
        caption: of the table.
        why: whether it says what would decide the undecided ones.
    """
    cells = []
    for row in rows:
        low, high = row.get("interval") or (None, None)
        numbers = (row.get("mean"), low, high, row.get("p_holm"), row["num_seeds"])
        cells.append((row["claim"], row["verdict"], *numbers, *([row["why"]] if why else [])))
    names = (*columns("difference", "low", "high", digits=4), Column("p (Holm)", 4), Column("seeds"))
    last = (Column("why"),) if why else ()
    reasons = {("", ""): _TOO_FEW} | {
        (row["claim"], name): "one seed can't tell"
        for row in rows
        if row.get("mean") is not None
        for name in ("low", "high", "p (Holm)")
    }
    return Table((Column("claim"), Column("verdict"), *names, *last), tuple(cells), caption, reasons)


def arms_table(found: Mapping[str, Any]) -> Table:
    """A row for each arm, and for each measure its mean and half of its interval; ``found`` is what study.json holds."""
    known = {(row["arm"], row["measure"]): row for row in found["arms"]}
    cells = []
    for arm in found["arm_settings"]:
        row: list[str | float | None] = [arm]
        for measure in found["measures"]:
            one = known.get((arm, measure))
            low, high = one["interval"] if one else (None, None)
            row += [one["mean"] if one else None, None if low is None or high is None else (high - low) / 2]
        cells.append(tuple(row))
    names = [name for measure in found["measures"] for name in (measure, f"± {measure}")]
    reasons = {
        ("", ""): "no run of the arm has it",
        **{("", f"± {measure}"): "one seed has no interval" for measure in found["measures"]},
    }
    measured = {arm for arm, _ in known}
    reasons |= {
        (arm, f"± {measure}"): "no run of the arm has it"
        for arm in found["arm_settings"]
        if arm not in measured
        for measure in found["measures"]
    }
    return Table((Column("arm"), *columns(*names, digits=3)), tuple(cells), "", reasons)


def headline(claim: Claim, row: Mapping[str, Any]) -> str:
    """One line for a claim."""
    if row.get("mean") is None:
        return f"{claim.text()}: undecided ({row['why']})"
    low, high = row["interval"]
    interval = "no interval" if low is None else f"[{low:+.4f}, {high:+.4f}]"
    why = f" ({row['why']})" if row["why"] else ""
    return f"{claim.text()}: {row['verdict']}{why}; difference {row['mean']:+.4f} {interval}"

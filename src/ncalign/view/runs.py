"""Runs to browse: the data of a training run, or the candidates of an online run's round, with the log-probs that it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ncalign.core import yaml as bounded_yaml
from ncalign.data.formats.folders import with_split
from ncalign.data.groups import Group, read_groups
from ncalign.online.artefacts import LOGPROBS, SAMPLES, Sample, read_artefact
from ncalign.view.config import ViewConfig
from ncalign.view.facts import Entry, with_logprobs
from ncalign.view.material import BETA, Material

_CONFIG, _ROUNDS, _POOL = "config.yaml", "rounds", "pool.jsonl"
_OF_RUNS = ("inputs.json", "metrics.jsonl")
_Row = tuple[Sequence[float | None], Sequence[float | None]]
"""Log-probs of a group's candidates under the policy and under the reference."""


def is_run(path: Path) -> bool:
    """Whether a folder is that of a `train` or `online` run."""
    return (path / _CONFIG).is_file() and any((path / name).is_file() for name in _OF_RUNS)


def run_material(config: ViewConfig) -> Material:
    """The groups of a run.

    Raises:
        ValueError: it has none that can be shown, or its configuration can't be read.
    """
    folder = Path(config.data)
    written = _written(folder / _CONFIG)
    objective = written.get("objective")
    own = objective.get("beta") if isinstance(objective, dict) else None
    beta = config.beta or (float(own) if isinstance(own, int | float) and own > 0 else BETA)
    if (folder / _ROUNDS).is_dir():
        return _online(config, folder, beta, mixed=written.get("candidates") == "fresh_and_offline")
    if config.round is not None:
        raise ValueError(f"round: {config.round}: {folder} is no online run: it has no rounds; leave round out")
    return _train(config, folder, written, beta)


def _written(path: Path) -> Mapping[str, Any]:
    try:
        found = bounded_yaml.load(bounded_yaml.read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} can't be read: {str(error).splitlines()[0]}; give the run's data in place of its folder"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no configuration: give the run's data in place of its folder")
    return found


# --- Training runs ----------------------------------------------------------------------------------------------------


def _train(config: ViewConfig, folder: Path, written: Mapping[str, Any], beta: float) -> Material:
    data = Path(str(written.get("data")))
    if not with_split(data)[0].exists():
        raise ValueError(
            f"{folder} was trained on {data}, which is not there (relative paths start at {Path.cwd()}): call view from the "
            "folder in which the run was started, or give the data"
        )
    options = {name: written.get(name, getattr(config, name)) for name in ("on_bad_row", "join_rows")}
    # What training left out is shown too: unusable groups are what one looks for.
    options |= {"schema": written.get("schema_name", config.schema_name)}

    @cache
    def known() -> tuple[Mapping[tuple[str, str], _Row], tuple[str, ...]]:
        # Encoding needs torch, which nothing else here waits for.
        from ncalign.view.trained import trained_logprobs

        return trained_logprobs(folder, written)

    def filled(group: Group) -> Entry:
        policy, reference = known()[0].get((group.id, group.origin or ""), ((), ()))
        return with_logprobs(group, _for_all(group, policy), _for_all(group, reference))

    kept = [folder / _CONFIG, folder / "inputs.json", *sorted((folder / "checkpoints").glob("step-*/state.json"))[-1:]]
    return Material(
        name=str(folder),
        data=data,
        options=options,
        beta=beta,
        notes=lambda: (f"The data of the run, {data}.", *known()[1]),
        files=tuple(path for path in kept if path.is_file()),
        fill=filled,
    )


def _for_all(group: Group, values: Sequence[float | None]) -> list[float | None]:
    """Values of the candidates with a reward, which training sees, as values of all."""
    given = iter(values)
    return [None if candidate.reward is None else next(given, None) for candidate in group.candidates]


# --- Online runs ------------------------------------------------------------------------------------------------------


def _online(config: ViewConfig, folder: Path, beta: float, *, mixed: bool) -> Material:
    there = sorted(path.parent for path in (folder / _ROUNDS).glob(f"*/{_POOL}") if path.parent.name.isdigit())
    if not there:
        raise ValueError(f"{folder} has no round with candidates yet: {_ROUNDS}/*/{_POOL} are what is shown")
    numbers = {int(path.name) + 1: path for path in there}
    number = max(numbers) if config.round is None else config.round
    if number not in numbers:
        raise ValueError(f"round: {number}: {folder} keeps the candidates of {_listed(list(numbers))}")
    of_round = numbers[number]

    @cache
    def rows() -> tuple[Mapping[str, _Row], tuple[str, ...]]:
        return round_logprobs(of_round, mixed=mixed)

    return Material(
        name=f"{folder}, round {number}",
        data=of_round / _POOL,
        options={"schema": "ncalign", "on_bad_row": "error", "join_rows": False},
        beta=beta,
        notes=lambda: (f"Candidates of round {number} (of {_listed(list(numbers))}).", *rows()[1]),
        files=tuple(sorted(path for kind in ("generated", "logprobs") for path in of_round.glob(f"{kind}-*.json"))),
        fill=lambda group: with_logprobs(group, *rows()[0].get(group.id, ((), ()))),
    )


def round_logprobs(folder: Path, *, mixed: bool) -> tuple[Mapping[str, _Row], tuple[str, ...]]:
    """Log-probs of the candidates in a round's pool, by their group's id, and what is to be said of them.

    Args:
        folder: of the round.
        mixed: whether the data's own candidates were mixed in; the pool has the fresh ones alone.

    Raises:
        ValueError: a file of the round is damaged.
    """
    sampled = [row for path in sorted(folder.glob("generated-*.json")) for row in read_artefact(path, SAMPLES)]
    asked = [row for row in sampled if any(one["text"].strip() for one in row)]
    kept = [read_artefact(path, LOGPROBS) for path in sorted(folder.glob("logprobs-*.json"))]
    policy, reference = ([row for part in kept for row in part[name]] for name in ("policy", "reference"))
    aligned = len(policy) == len(reference) == len(asked)
    found: dict[str, _Row] = {}
    # The prompts that are trained on come first; those that measure the drift have no place in the pool.
    for place, group in enumerate(read_groups(folder / _POOL, schema="ncalign")):
        if place >= len(asked) or sum(bool(one["text"].strip()) for one in asked[place]) != len(group.candidates):
            return {}, ("No log-probs: the round's samples are not those of its pool.",)
        own = _with_text(asked[place], [one["logprob"] for one in asked[place]], mixed=False)
        computed = _with_text(asked[place], policy[place], mixed=mixed) if aligned else ()
        base = _with_text(asked[place], reference[place], mixed=mixed) if aligned else ()
        found[group.id] = computed or own, base
    if not aligned:
        return found, ("Log-probs are those that generation counted: the round keeps no others that can be told apart.",)
    return found, ("Log-probs are the policy's as it was when the round began, and the reference's where it was needed.",)


def _with_text(samples: Sequence[Sample], values: Sequence[float | None] | None, *, mixed: bool) -> tuple[float | None, ...]:
    """The values of the completions that have text, which are the pool's candidates; nothing where that can't be told."""
    there = [k for k, one in enumerate(samples) if one["text"].strip()]
    if values is None or (mixed and len(there) < len(samples)):
        return ()
    if len(values) == len(samples) or (mixed and len(values) > len(samples)):
        return tuple(values[k] for k in there)
    return tuple(values) if len(values) == len(there) else ()


def _listed(numbers: Sequence[int]) -> str:
    return f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {', '.join(map(str, sorted(numbers)))}"

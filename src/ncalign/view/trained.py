"""Log-probs of a training run's candidates: those that it started from, and those that it saw last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ncalign.core.cache import cache_folder
from ncalign.core.kept import read_kept
from ncalign.model.encoding import EncodedGroup, make_encoder
from ncalign.model.limits import limits_of_folder
from ncalign.model.policy import load_tokenizer
from ncalign.model.reference import ReferenceCache, candidate_key, data_digest
from ncalign.objectives import build_method
from ncalign.training.checkpoint import REMEDY, find_checkpoints
from ncalign.training.config import TrainConfig
from ncalign.training.data import LoadedGroups, held_out_places, load_groups
from ncalign.training.saved import TRAIN_STATE
from ncalign.training.variants import vary_groups

_Logprobs = dict[tuple[str, str], tuple[tuple[float | None, ...], tuple[float | None, ...]]]


def trained_logprobs(folder: Path, written: Mapping[str, Any]) -> tuple[_Logprobs, tuple[str, ...]]:
    """Log-probs by a group's id and origin, of its candidates with a reward: the policy's and the reference's.

    The reference's lie in the cache under the weights that the run began with; the policy's are those of each candidate's last
    visit, which a checkpoint has where the method draws by them. Code that comes with the model is not run.

    Args:
        folder: of the run.
        written: its configuration.

    Returns:
        The log-probs, and what is to be said of them.
    """
    try:
        config = TrainConfig.model_validate({**written, "trust_remote_code": False, "on_bad_row": "skip"})
        tokenizer = load_tokenizer(config.model, trust_remote_code=False)
        encoder = make_encoder(tokenizer, config.encoding, limits=limits_of_folder(config.model, trust_remote_code=False))
        loaded = load_groups(
            config.data,
            encoder,
            method=build_method(config.objective),
            on_bad_row="skip",
            schema=config.schema_name,
            join_rows=config.join_rows,
        )
        policy, told = _last_visits(folder, config, loaded)
    except ValidationError as error:
        return {}, (f"No log-probs: the run's configuration is not of this version ({error.error_count()} problems).",)
    except (ValueError, OSError) as error:
        return {}, (f"No log-probs: {str(error).splitlines()[0]}.",)
    reference = _reference(folder, config, loaded.groups)
    found: _Logprobs = {}
    for number, group in enumerate(loaded.groups):
        found[group.id, group.origin] = policy.get(number, ()), reference[number]
    known = sum(any(value is not None for value in row) for row in reference)
    first = f"Reference log-probs of {known:,} of the {len(reference):,} groups that the method can use are in the cache."
    return found, (first if config.reference == "compute" else "Reference log-probs are the data's.", told)


def _reference(folder: Path, config: TrainConfig, groups: Sequence[EncodedGroup]) -> list[tuple[float | None, ...]]:
    if config.reference == "data":
        return [group.reference_logprobs for group in groups]
    weights = _inputs(folder).get("weights", "")[:32]
    values: dict[bytes, float] = {}
    for kept in sorted(((config.cache_dir or cache_folder()) / "reference").glob(f"{weights}*")) if weights else ():
        values |= ReferenceCache(kept).values
    return [tuple(values.get(candidate_key(group, k)) for k in range(len(group.completions))) for group in groups]


def _last_visits(folder: Path, config: TrainConfig, loaded: LoadedGroups) -> tuple[dict[int, tuple[float | None, ...]], str]:
    """By the places of loaded groups: log-probs of the candidates that a checkpoint has; and what is to be said of them."""
    none = "The policy's log-probs are not kept by this run."
    checkpoints = find_checkpoints(folder)
    state = read_kept(checkpoints[-1] / "state.json", TRAIN_STATE, remedy=REMEDY) if checkpoints else None
    visits = None if state is None else state["loop"].get("last_visits")
    if state is None or visits is None:
        return {}, none
    if config.corrupt is not None:
        return {}, f"{none[:-1]}: it trained on candidates that were corrupted."
    out = (
        () if config.eval_data is not None else held_out_places(loaded.prompts, fraction=config.eval_fraction, seed=config.seed)
    )
    places = [place for place in range(len(loaded.groups)) if place not in out]
    varied = vary_groups(
        [loaded.groups[place] for place in places],
        max_candidates=config.max_candidates,
        corrupt=None,
        seed=config.seed,
        max_length=config.encoding.max_length,
        refuse=lambda rewards: None,
    )
    if config.reference == "compute" and state["data"] != data_digest(varied.groups):
        return {}, "The policy's log-probs are not shown: the data or the tokenizer changed since the run."
    found: dict[int, list[float | None]] = {}
    for row, column, value in zip(visits["rows"], visits["columns"], visits["logprobs"], strict=True):
        columns = varied.columns[row] if varied.columns else range(len(varied.groups[row].completions))
        place = places[row]
        found.setdefault(place, [None] * len(loaded.groups[place].completions))[columns[column]] = value
    step = checkpoints[-1].name
    return {place: tuple(values) for place, values in found.items()}, (
        f"The policy's log-probs are those of each candidate's last visit, as {step} has them."
    )


def _inputs(folder: Path) -> dict[str, Any]:
    path = folder / "inputs.json"
    if not path.is_file():
        return {}
    return read_kept(path, TypeAdapter(dict[str, str]), remedy="restore it, or give the run's data")

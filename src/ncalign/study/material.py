"""The model and the data of a study: those that it names, or those that ncalign makes for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.core.atomic import write_json_atomic
from ncalign.core.outputs import claim, record
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.groups import REWARD_STEPS, Group, read_groups, write_groups
from ncalign.demo.candidates import MAX_NEW_TOKENS, TEMPERATURE, TOP_P, has_spread, sample_and_score, shipped_candidates
from ncalign.demo.model import demo_model_folder
from ncalign.demo.tasks import make_prompts
from ncalign.generation.base import SamplingParams
from ncalign.generation.generate import sample_groups
from ncalign.generation.local import TransformersGenerator, load_for_generation
from ncalign.rewards.config import RewardConfig
from ncalign.rewards.score import score_groups
from ncalign.rewards.sources import reward_source, source_record
from ncalign.rewards.verifiable import ReasoningGymReward
from ncalign.study.config import Evaluation, Material, StudyFile
from ncalign.study.spec import Study
from ncalign.study.tiny_model import tiny_model_folder, write_tiny_model_folder
from ncalign.study.tiny_tasks import Mix, Part, tiny_prompts
from ncalign.tasks.programs import read_programs
from ncalign.training.data import held_out_places, prompt_digest

DATA = "data"
TRAIN, HELD_OUT = "train.jsonl", "held-out.jsonl"
_TINY_TOKENS = 16
_BATCH = 512
_REWARDS = RewardConfig(reward=("reasoning_gym",), reward_timeout=300.0, max_failed_share=0.1)
_TESTS = RewardConfig(reward=("ncalign.tasks.programs:passes_tests",), max_failed_share=0.1)
_PROGRAM_TOKENS = 256
_HELD_OUT_SEED = 0
_DEMO_SAMPLES = 4


def with_material(study: Study, folder: Path) -> Study:
    """The study with its model, data and held-out data as paths, made in the study's folder where they are not there.

    Without ``eval_data`` a fraction of the data is held out here, once: every run has the same held-out prompts.

    Raises:
        ValueError: there is nothing to hold out.
    """
    file, data = study.file, folder / DATA
    if file.material is not None:
        file = _made(file, file.material, data)
    elif "eval_data" not in file.base:
        file = _split(file, data)
    return replace(study, file=file)


def write_tiny_material(folder: Path) -> dict[str, Any]:
    """Write the tiny model, and scored groups of its own answers, for trying out any verb.

    Args:
        folder: to write ``model/``, ``groups.jsonl``, ``held-out.jsonl`` and ``prompts.jsonl`` to.

    Returns:
        The paths, and a printable text.

    Raises:
        ValueError: something is there already.
    """
    names = ("model", "groups.jsonl", "held-out.jsonl", "prompts.jsonl")
    say("The tiny model answers its tasks, and verifiers score the answers")
    claim(folder, names, verb="study", inputs={}, overwrite=False)
    record(folder, names, verb="study")
    write_tiny_model_folder(folder / "model")
    groups = tiny_groups(folder / "model", mix="words", part="train", num_prompts=192, num_samples=8)
    write_groups(groups, folder / "groups.jsonl")
    held_out = tiny_groups(folder / "model", mix="words", part="heldout", num_prompts=64, num_samples=8)
    write_groups(held_out, folder / "held-out.jsonl")
    write_groups(tiny_prompts(192, mix="words", part="train"), folder / "prompts.jsonl")
    paths = {name.partition(".")[0].replace("-", "_"): str(folder / name) for name in names}
    return {**paths, "text": "\n".join(f"{name}: {path}" for name, path in paths.items())}


def tiny_groups(model: Path, *, mix: Mix, part: Part, num_prompts: int, num_samples: int) -> list[Group]:
    """Prompts with the tiny model's own answers, scored by the tasks' verifiers."""
    loaded, tokenizer = load_for_generation(str(model), dtype="float32", trust_remote_code=False)
    generator = TransformersGenerator(loaded, tokenizer, batch_size=_BATCH, progress=False)
    params = SamplingParams(_TINY_TOKENS, temperature=1.0)
    prompts = tiny_prompts(num_prompts, mix=mix, part=part)
    groups, _ = sample_groups(prompts, generator, num_samples=num_samples, params=params, seed=0, source="tiny model")
    scored = score_groups([group for group in groups if group.candidates], ReasoningGymReward())
    record = source_record(_REWARDS)
    return [replace(group, metadata={**group.metadata, REWARD_STEPS: [record]}) for group in scored]


def _made(file: StudyFile, material: Material, data: Path) -> StudyFile:
    """The study's file with the paths of what a material names."""
    if material.kind == "programs":
        if material.data is None:
            raise ValueError("material: programs come from a file of problems with samples: give it with --data")
        # A study of programs may name another model.
        model = str(file.base.get("model") or demo_model_folder())
        rewards, tokens = _TESTS, _PROGRAM_TOKENS
    elif material.kind == "tiny":
        model, rewards, tokens = str(tiny_model_folder()), _REWARDS, _TINY_TOKENS
    else:
        model, rewards, tokens = str(demo_model_folder()), _REWARDS, MAX_NEW_TOKENS
    _write_once(material, Path(model), data)
    paths = {"model": model, "data": str(data / TRAIN), "eval_data": str(data / HELD_OUT)}
    evaluate = file.evaluate or Evaluation(rewards=rewards, max_new_tokens=tokens)
    return file.model_copy(update={"base": {**file.base, **paths}, "evaluate": evaluate})


def _write_once(material: Material, model: Path, data: Path) -> None:
    """Write the groups, unless those of this material are there."""
    digest = None if material.data is None else hashlib.sha256(material.data.read_bytes()).hexdigest()
    key = Store.key(material.model_dump(mode="json"), model.name, digest)
    made = data / "made.json"
    if made.is_file() and made.read_text(encoding="utf-8").strip() == f'"{key}"':
        return
    say(f"Making the study's data in {data}")
    train, held_out = _groups_of(material, model)
    write_groups([group for group in train if has_spread(group)][: material.num_prompts], data / TRAIN)
    write_groups(held_out, data / HELD_OUT)
    write_json_atomic(key, made)


def _groups_of(material: Material, model: Path) -> tuple[list[Group], list[Group]]:
    """Groups to train on, and held-out ones."""
    if material.kind == "programs":
        assert material.data is not None
        return program_groups(material.data, num_samples=material.num_samples, num_held_out=material.num_held_out)
    if material.kind == "tiny":
        mix, num_samples = material.mix, material.num_samples
        train = tiny_groups(model, mix=mix, part="train", num_prompts=material.num_prompts, num_samples=num_samples)
        return train, tiny_groups(model, mix=mix, part="heldout", num_prompts=material.num_held_out, num_samples=num_samples)
    params = SamplingParams(MAX_NEW_TOKENS, temperature=TEMPERATURE, top_p=TOP_P)
    prompts = make_prompts(material.num_held_out, _HELD_OUT_SEED, "heldout")
    return shipped_candidates(), sample_and_score(str(model), prompts, _DEMO_SAMPLES, params, seed=0)


def program_groups(file: Path, *, num_samples: int, num_held_out: int) -> tuple[list[Group], list[Group]]:
    """Problems with sampled programs, scored by their tests, as groups to train on and held-out ones.

    Args:
        file: of problems with samples (:func:`ncalign.tasks.programs.read_programs`).
        num_samples: candidates of a problem.
        num_held_out: problems that are held out, drawn once for all.

    Raises:
        ValueError: the file can't be read, all its problems would be held out, or this system can't confine programs.
    """
    groups = read_programs(file, num_samples=num_samples)
    if len(groups) <= num_held_out:
        raise ValueError(f"{file} has {len(groups)} problems, and num_held_out is {num_held_out}: none is left to train on")
    say(f"Running {sum(len(group.candidates) for group in groups)} programs with their tests")
    source = reward_source(_TESTS, dtype=None)
    scored = [
        replace(one, metadata={**one.metadata, REWARD_STEPS: [source_record(_TESTS)]}) for one in score_groups(groups, source)
    ]
    out = set(np.random.default_rng(_HELD_OUT_SEED).permutation(len(scored))[:num_held_out].tolist())
    return [group for at, group in enumerate(scored) if at not in out], [scored[at] for at in sorted(out)]


def _split(file: StudyFile, data: Path) -> StudyFile:
    """Hold out a fraction of the base run's data."""
    base = dict(file.base)
    fraction = float(base.pop("eval_fraction", 0.0))
    if "data" not in base:
        raise ValueError("base has no data: give the groups to train on")
    if not fraction:
        raise ValueError("a study measures on held-out groups: give base.eval_data, or base.eval_fraction of the data")
    path = Path(str(base["data"]))
    schema, join_rows = base.get("schema_name", "auto"), base.get("join_rows", True)
    on_bad_row = base.get("on_bad_row", "error")
    groups = list(read_groups(path, schema=schema, on_bad_row=on_bad_row, join_rows=join_rows, allow_empty=True))
    out = held_out_places([prompt_digest(group) for group in groups], fraction=fraction, seed=_HELD_OUT_SEED)
    if not out:
        raise ValueError(f"eval_fraction: {fraction:g} holds out none of the {len(groups)} groups of {path}: raise it")
    _write_part(groups, out, data / HELD_OUT, inside=True)
    _write_part(groups, out, data / TRAIN, inside=False)
    # They are ordinary groups now, whatever their file's schema.
    base = {name: value for name, value in base.items() if name != "schema_name"}
    return file.model_copy(update={"base": {**base, "data": str(data / TRAIN), "eval_data": str(data / HELD_OUT)}})


def _write_part(groups: Sequence[Group], out: set[int], path: Path, *, inside: bool) -> None:
    write_groups((group for place, group in enumerate(groups) if (place in out) == inside), path)

"""What a finished run is measured by: held-out prompts answered and scored, held-out candidates' log-probs, speed, tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ncalign.core.json import read_results
from ncalign.data.config import OnBadRow
from ncalign.data.formats import SchemaName
from ncalign.data.groups import Group, read_groups
from ncalign.generation.base import Completion, SamplingParams
from ncalign.generation.generate import completion_as_candidate, sample_prompts
from ncalign.generation.local import TransformersGenerator, load_for_generation
from ncalign.model.batching import collate
from ncalign.model.config import EncodingConfig, Precision
from ncalign.model.encoding import EncodedGroup, Encoder, conversation_rules, make_encoder
from ncalign.model.limits import filler_id, limits_of
from ncalign.model.logprobs import completion_logprobs
from ncalign.model.precision import resolve_dtype
from ncalign.model.sharing import share_prompts
from ncalign.rewards.base import RewardSource, score_many
from ncalign.rewards.sources import check_failures, reward_dtype, reward_source
from ncalign.study.config import ANSWERED, OF_RUNS, OF_TASKS, Evaluation, Measure, TaskSuite
from ncalign.tasks.lm_backend import Backend
from ncalign.tasks.reasoning import TaskProtocol, run_tasks
from ncalign.training import run_folder
from ncalign.training.config import TrainConfig
from ncalign.training.metrics import pair_accuracy

Values: TypeAlias = dict[str, float]
"""By prompt; of a run's own measure, by the empty name."""
_GROUPS_AT_A_TIME = 16
_GREEDY = 0.0


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes:
        held_out: groups that were not trained on.
        measures: what is asked for.
        evaluation: how held-out prompts are answered and scored; None where they are not.
        tasks: reasoning tasks that are asked; None for none.
        tasks_folder: where their results and answers are kept.
    """

    held_out: Path
    measures: tuple[Measure, ...]
    evaluation: Evaluation | None = None
    tasks: TaskSuite | None = None
    tasks_folder: Path | None = None


@dataclass(frozen=True)
class Found:
    """What was measured of a run.

    Attributes:
        values: of each measure, for each held-out group that has one, by the group's id.
        answers: the greedy answer to each held-out prompt that was answered.
    """

    values: dict[str, Values]
    answers: dict[str, str]


def measure_run(config: TrainConfig, plan: Plan, *, trained: bool = True) -> Found:
    """Measure the model that a run left, or the one that it starts from.

    Args:
        config: of the run.
        plan: what is measured.
        trained: false for the starting model, of which a run's own measures are left out.

    Raises:
        ValueError: a reward source fails, a held-out group can't be encoded, or a task can't be run.
    """
    found: dict[str, Values] = {}
    answers: dict[str, str] = {}
    if trained and any(name in OF_RUNS for name in plan.measures):
        found |= {name: {"": value} for name, value in _of_run(config.output_dir).items()}
    if any(name in OF_TASKS for name in plan.measures):
        assert plan.tasks is not None
        assert plan.tasks_folder is not None
        found["task_score"] = _task_scores(_model_of(config, trained), plan.tasks, plan.tasks_folder, seed=config.seed)
    wanted = [name for name in plan.measures if name not in (*OF_RUNS, *OF_TASKS)]
    if wanted:
        groups = read_held_out(plan.held_out, config)
        measured = _Measured(config, trained=trained)
        if any(name not in ANSWERED for name in wanted):
            found |= measured.likelihoods(groups)
        if any(name in ANSWERED for name in wanted):
            assert plan.evaluation is not None
            values, answers = measured.answers(groups, plan.evaluation, wanted)
            found |= values
    return Found({name: found.get(name, {}) for name in plan.measures}, answers)


class _Measured:
    """A run's model beside the one that it started from."""

    def __init__(self, config: TrainConfig, *, trained: bool) -> None:
        self._config = config
        # The run's own: what auto means is measured, and may come out otherwise now.
        self._dtype: Precision = (
            read_results(config.output_dir / run_folder.RESULTS)["dtype"] if trained else resolve_dtype(config.dtype)
        )
        self._model, self._tokenizer = load_for_generation(
            _model_of(config, trained), dtype=self._dtype, trust_remote_code=config.trust_remote_code
        )
        self._base, _ = _starting_model(config.model, self._dtype, config.trust_remote_code)
        self._encoder = _encoder(self._model, self._tokenizer, config.encoding)

    def likelihoods(self, groups: Sequence[Group]) -> dict[str, Values]:
        """How the log-probs of held-out candidates changed, and whether they are ordered as the rewards."""
        scored = [replace(g, candidates=[c for c in g.candidates if c.reward is not None]) for g in groups]
        encoded = [self._encoder.encode(group) for group in scored if len(group.candidates) > 1]
        found: dict[str, Values] = {"reward_accuracy": {}, "chosen_change": {}, "rejected_change": {}}
        for group, changes in zip(encoded, self._changes(encoded), strict=True):
            rewards = np.array(group.rewards, dtype=np.float64)
            best = int(np.argmax(rewards))
            worse = rewards < rewards[best]
            found["chosen_change"][group.id] = float(changes[best])
            if worse.any():
                found["rejected_change"][group.id] = float(changes[worse].mean())
                found["reward_accuracy"][group.id] = _accuracy(changes, rewards)
        return found

    def answers(
        self, groups: Sequence[Group], evaluation: Evaluation, measures: Sequence[Measure]
    ) -> tuple[dict[str, Values], dict[str, str]]:
        """Greedy and sampled answers where measures need them: rewards, lengths, KL from the start; and the greedy texts."""
        rules = self._config.encoding
        generator = TransformersGenerator(
            self._model,
            self._tokenizer,
            string_prompts=rules.string_prompts,
            batch_size=evaluation.batch_size,
            control_tokens=rules.control_tokens_in_text,
            template=conversation_rules(rules).template(self._tokenizer, rules.template_date),
            progress=False,
        )

        def answered(num_samples: int, temperature: float) -> list[list[Completion]]:
            params = SamplingParams(evaluation.max_new_tokens, temperature=temperature)
            # Every arm draws with the same random numbers.
            seed = self._config.seed
            return sample_prompts(groups, generator, num_samples=num_samples, params=params, seed=seed, left_out=None)

        source = held_out_source(evaluation, self._config)
        ids, found, texts = [group.id for group in groups], dict[str, Values](), dict[str, str]()
        if {"reward", "solved"} & set(measures):
            greedy = answered(1, _GREEDY)
            texts = {name: completions[0].text for name, completions in zip(ids, greedy, strict=True) if completions}
            rewards = _rewards(groups, greedy, source, evaluation.empty_reward)
            solved = [[float(reward >= evaluation.solved_at) for reward in some] for some in rewards]
            found |= {"reward": _means(ids, rewards), "solved": _means(ids, solved)}
        if {"sampled_reward", "length", "kl"} & set(measures):
            sampled = answered(evaluation.num_samples, evaluation.temperature)
            lengths = [[float(one.num_tokens) for one in completions] for completions in sampled]
            found["sampled_reward"] = _means(ids, _rewards(groups, sampled, source, evaluation.empty_reward))
            found["length"] = _means(ids, lengths)
            if "kl" in measures:
                found["kl"] = self._divergence(groups, sampled)
        check_failures(source)
        return found, texts

    def _divergence(self, groups: Sequence[Group], sampled: Sequence[Sequence[Completion]]) -> Values:
        """KL of the model from the one that it started from, estimated on its own answers; nats an answer."""
        answered = [
            replace(group, candidates=[completion_as_candidate(group, one, "policy") for one in some if one.text.strip()])
            for group, some in zip(groups, sampled, strict=True)
        ]
        encoded = [self._encoder.encode(group) for group in answered if group.candidates]
        return {group.id: float(changes.mean()) for group, changes in zip(encoded, self._changes(encoded), strict=True)}

    def _changes(self, groups: Sequence[EncodedGroup]) -> list[np.ndarray]:
        """Log-ratios of each group's completions, in nats."""
        pad = filler_id(self._model, self._tokenizer)
        # Where an architecture can't, a row for each completion gives the same, slower.
        share_prompts(self._model)
        share_prompts(self._base)
        after, before = (_logprobs(model, groups, pad) for model in (self._model, self._base))
        return [one - other for one, other in zip(after, before, strict=True)]


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, groups: Sequence[EncodedGroup], pad: int) -> list[np.ndarray]:
    found = []
    for start in range(0, len(groups), _GROUPS_AT_A_TIME):
        some = groups[start : start + _GROUPS_AT_A_TIME]
        rows = completion_logprobs(model, collate(some, pad_token_id=pad).to(model.device)).double().cpu().numpy()
        found += [row[: len(group.completions)] for row, group in zip(rows, some, strict=True)]
    return found


@lru_cache(maxsize=1)
def _starting_model(model: str, dtype: Precision, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """One for all runs of a process."""
    return load_for_generation(model, dtype=dtype, trust_remote_code=trust_remote_code)


def _encoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rules: EncodingConfig) -> Encoder:
    return make_encoder(tokenizer, rules, limits=limits_of(model))


def held_out_source(evaluation: Evaluation, config: TrainConfig) -> RewardSource:
    """What scores the answers to held-out prompts.

    Raises:
        ValueError: there is no such source.
    """
    return reward_source(
        evaluation.rewards,
        dtype=reward_dtype(evaluation.rewards, config.dtype),
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        today=config.encoding.template_date,
    )


def read_held_out(path: Path, config: TrainConfig) -> list[Group]:
    """Held-out groups, read as a run's data are.

    Raises:
        ValueError: the file can't be read.
    """
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return list(_groups_of(path, changed, config.schema_name, config.on_bad_row, config.join_rows))


@lru_cache(maxsize=1)
def _groups_of(path: Path, changed: int, schema: SchemaName, on_bad_row: OnBadRow, join_rows: bool) -> tuple[Group, ...]:
    """Read once for all runs of a process, as long as the file stays as it is."""
    return tuple(read_groups(path, schema=schema, on_bad_row=on_bad_row, join_rows=join_rows, allow_empty=True))


def _rewards(
    groups: Sequence[Group], answers: Sequence[Sequence[Completion]], source: RewardSource, empty: float
) -> list[list[float]]:
    """Rewards of each group's answers; those that a source has none for are left out."""
    asked = [
        replace(group, candidates=[completion_as_candidate(group, one, "policy") for one in some if one.text.strip()])
        for group, some in zip(groups, answers, strict=True)
    ]
    scored = iter(score_many(source, [group for group in asked if group.candidates]))
    found = []
    for group, some in zip(asked, answers, strict=True):
        known = [reward for reward in next(scored) if reward is not None] if group.candidates else []
        found.append([*known, *[empty] * (len(some) - len(group.candidates))])
    return found


def _means(ids: Sequence[str], rows: Sequence[Sequence[float]]) -> Values:
    return {name: float(np.mean(row)) for name, row in zip(ids, rows, strict=True) if len(row)}


def _accuracy(changes: np.ndarray, rewards: np.ndarray) -> float:
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    return float(pair_accuracy(torch.from_numpy(changes)[None], torch.from_numpy(rewards)[None], mask))


def _model_of(config: TrainConfig, trained: bool) -> str:
    return str(config.output_dir / run_folder.MODEL) if trained else config.model


def _task_scores(model: str, tasks: TaskSuite, folder: Path, *, seed: int) -> Values:
    """The score of each reasoning task.

    Raises:
        ValueError: one failed; the others' results are kept for a rerun.
    """
    found = run_tasks(
        model,
        tasks.names,
        output_dir=folder,
        task_data=tasks.files(),
        backend=Backend("hf", batch_size=tasks.batch_size),
        protocol=TaskProtocol(tasks.limit, tasks.num_fewshot, tasks.apply_chat_template, seed),
    )
    for task, reason in found["failed"].items():
        raise ValueError(f"task {task} failed: {reason}")
    return {task: float(result["score"]) for task, result in found["results"].items()}


def _of_run(folder: Path) -> Values:
    """Training's speed after its first step, tokens generated and drift, as the run's own records say."""
    rows = [json.loads(line) for line in (folder / run_folder.METRICS).read_text(encoding="utf-8").splitlines()]
    speeds = [float(row["tokens_per_second"]) for row in rows if "loss" in row and "tokens_per_second" in row]
    results = read_results(folder / run_folder.RESULTS)
    found = {"tokens_generated": float(results["data"].get("tokens_generated", 0))}
    if len(speeds) > 1:
        found["tokens_per_second"] = float(np.median(speeds[1:]))
    drifts = [row["drift"]["kl"] for row in results.get("rounds", ()) if row["drift"] is not None]
    return {**found, "drift": float(np.mean(drifts))} if drifts else found

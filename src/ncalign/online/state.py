"""The state of an online run: in memory, and in its checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ncalign.core.progress import say
from ncalign.data.groups import Group, ReadReport, read_groups
from ncalign.data.rendering import count_renderings, rendering_warning
from ncalign.model.encoding import Encoder
from ncalign.model.policy import Policy, reading_fingerprint
from ncalign.model.untold import untold_notices
from ncalign.objectives import Method
from ncalign.online.backends import GeneratorOf, make_generator
from ncalign.online.clock import Clock
from ncalign.online.config import OnlineConfig
from ncalign.online.offline import Offline, offline_variants
from ncalign.online.rounds import num_steps
from ncalign.online.weights import ReferenceWeights
from ncalign.rewards.base import RewardSource
from ncalign.rewards.sources import reward_source, source_digests
from ncalign.training import run_folder
from ncalign.training.assembly import make_engine
from ncalign.training.checkpoint import delete_old, load_checkpoint, refuse_other_run, save_checkpoint
from ncalign.training.data import held_out_places, prompt_digest
from ncalign.training.engine import Engine
from ncalign.training.export import merges
from ncalign.training.loading import open_policy
from ncalign.training.peers import say_first
from ncalign.training.run_folder import MetricsFile
from ncalign.training.saved import ONLINE_STATE, LoopState
from ncalign.training.space import DiskNeed, disk_need
from ncalign.training.trackers import log_to_trackers

_DRIFT_PROMPTS, _DRIFT_SHARE = 16, 10
"""How many prompts are kept out for the drift unless told, and one in how many at most."""
_BYTES_PER_TOKEN = 16
"""Of a round's samples: as ids and as text, in two files each."""


@dataclass
class Position:
    """The run's progress.

    Attributes:
        round: the round that is under way.
        start: its first step.
        step: steps taken in all.
        ended: whether the round's training is over.
        loop: the training loop's own state; none before the first step.
        pool: digest of the round's pool, once it was trained on.
    """

    round: int = 0
    start: int = 0
    step: int = 0
    ended: bool = False
    loop: LoopState | None = None
    pool: str | None = None


@dataclass
class Run:
    """What lasts for the whole run.

    Of the prompts, ``prompts`` are trained on; ``kept_out`` are answered in every round too, and the drift is measured on their
    completions; ``held_out`` are for evaluation. ``offline`` is what settings made of the prompts' own candidates.
    ``groups_per_step`` counts the groups of all processes in an optimizer step.
    """

    config: OnlineConfig
    accelerator: Accelerator
    policy: Policy
    encoder: Encoder
    method: Method
    engine: Engine
    optimizer: torch.optim.Optimizer
    reference: ReferenceWeights
    generator: GeneratorOf
    source: RewardSource
    prompts: list[Group]
    held_out: list[Group]
    kept_out: list[Group]
    total: int
    groups_per_step: int
    inputs: dict[str, str]
    offline: Offline = field(default_factory=Offline)
    clock: Clock = field(default_factory=Clock)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line on stderr, of the first process alone."""
        say_first(self.accelerator, text)

    def track(self, metrics: MetricsFile | None, row: dict[str, float]) -> None:
        """Write a row of metrics to the first process's file and to the trackers."""
        if metrics is not None:
            metrics.write(row)
        log_to_trackers(self.config.training, self.accelerator, row)

    def folder(self, number: int) -> Path:
        """A round's artefacts."""
        return self.config.training.output_dir / run_folder.ROUNDS / f"{number:03d}"


def open_run(config: OnlineConfig, accelerator: Accelerator, method: Method, *, own: Mapping[str, str], step_size: int) -> Run:
    """Load prompts, rewards and model, and refuse what can't be used before anything is written.

    ``own`` holds digests of what is not configured, a method of the user's; ``step_size`` groups are in an optimizer step.
    """
    training = config.training
    torch.manual_seed(training.seed)
    assert training.dtype != "auto"
    source = reward_source(
        config.rewards,
        dtype=training.dtype,
        cache_dir=training.cache_dir,
        trust_remote_code=training.trust_remote_code,
        today=training.encoding.template_date,
    )
    prompts, held_out = load_prompts(config, accelerator)
    prompts, kept_out = keep_out(prompts, config, say=partial(say_first, accelerator))
    say_first(accelerator, f"Loading {training.model}")
    policy, encoder = open_policy(training, accelerator)
    # Offline candidates are encoded with the prompt as it is put to the policy now.
    made = count_renderings(prompts) if config.candidates == "fresh_and_offline" else Counter()
    if warning := rendering_warning(made, encoder.string_prompts, what=str(training.data), does="this run encodes them"):
        say_first(accelerator, warning)
    if accelerator.is_main_process:
        _say_what_is_left_out(config, encoder, [*prompts, *kept_out, *held_out])
    engine, optimizer = make_engine(training, policy, method, accelerator)
    total = num_steps(
        len(prompts),
        groups_per_step=step_size,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )
    reference = ReferenceWeights(engine.inner, kind=config.reference, decay=config.reference_decay)
    generator = make_generator(config, policy, engine, accelerator)
    inputs = {
        "weights": policy.fingerprint,
        "tokenizer": reading_fingerprint(policy.model, policy.tokenizer),
        **{name: _groups_digest(some) for name, some in (("data", [*prompts, *kept_out]), ("eval_data", held_out)) if some},
        **source_digests(config.rewards, source),
        **own,
    }
    return Run(
        config=config,
        accelerator=accelerator,
        policy=policy,
        encoder=encoder,
        method=method,
        engine=engine,
        optimizer=optimizer,
        reference=reference,
        generator=generator,
        source=source,
        prompts=prompts,
        held_out=held_out,
        kept_out=kept_out,
        total=total,
        groups_per_step=step_size,
        inputs=inputs,
        offline=offline_variants(prompts, encoder, config.training),
    )


def _say_what_is_left_out(config: OnlineConfig, encoder: Encoder, groups: Sequence[Group]) -> None:
    """Say what the policy's chat template leaves out of the prompts, and of the candidates that are mixed in."""
    mixed = config.candidates == "fresh_and_offline"
    asked = groups if mixed else [replace(group, candidates=[]) for group in groups]
    for notice in untold_notices(Counter(name for group in asked for name in encoder.left_out(group))):
        say(f"note: {notice}")


def needed_space(run: Run) -> DiskNeed:
    """What the run will write to its folder: a checkpoint at the end of each round at least, and the rounds' samples."""
    config = run.config
    tokens = run.total * run.groups_per_step * config.num_samples * config.max_new_tokens
    moved = sum(tensor.nbytes for tensor in run.reference.state().values())
    need = disk_need(
        config.training,
        run.engine.inner.model,
        merged=run.policy.merged_dtype if merges(run.policy, config.training) else None,
        num_steps=run.total,
        num_saves=run.total,
        kept_tensors=moved,
        samples=_BYTES_PER_TOKEN * tokens,
    )
    if config.push in ("none", "nccl") or config.generator == "transformers":
        return need
    # A round's weights are written while the last round's are there.
    return replace(need, others=need.others + 2 * (need.checkpoint // 3 if config.push == "lora" else need.model))


def load_prompts(config: OnlineConfig, accelerator: Accelerator) -> tuple[list[Group], list[Group]]:
    """Prompts to train on and held-out ones; equal prompts fall on the same side."""

    def read(path: Path) -> list[Group]:
        report = ReadReport()
        groups = read_groups(
            path,
            schema=config.training.schema_name,
            on_bad_row=config.training.on_bad_row,
            report=report,
            allow_empty=True,
            join_rows=config.training.join_rows,
        )
        found = list(groups)
        if notice := report.notice(path):
            say_first(accelerator, notice)
        return found

    prompts = read(config.training.data)
    if not prompts:
        raise ValueError(f"{config.training.data} has no prompt to answer")
    if config.candidates == "fresh_and_offline" and not any(c.reward is not None for g in prompts for c in g.candidates):
        raise ValueError(
            f"candidates: fresh_and_offline: {config.training.data} has no candidate with a reward; score it, or use fresh"
        )
    if config.training.eval_data is not None:
        return prompts, read(config.training.eval_data)
    out = held_out_places(
        [prompt_digest(group) for group in prompts], fraction=config.training.eval_fraction, seed=config.training.seed
    )
    train = [group for place, group in enumerate(prompts) if place not in out]
    return train, [group for place, group in enumerate(prompts) if place in out]


def keep_out(
    prompts: Sequence[Group], config: OnlineConfig, *, say: Callable[[str], None] = say
) -> tuple[list[Group], list[Group]]:
    """Prompts to train on, and those that are never trained on, so that drift can be measured on their completions.

    Which these are depends on the prompts and the seed alone, for the whole run: the rounds measure on the same prompts, and
    none was fitted in an earlier round. Each is there once, however often the data has it.

    Raises:
        ValueError: ``drift_prompts`` leaves none to train on, or ``regenerate_on_drift`` has nothing to measure.
    """
    wanted, digests = config.drift_prompts, [prompt_digest(group) for group in prompts]
    different = len(set(digests))
    if wanted is None:
        wanted = min(_DRIFT_PROMPTS, different // _DRIFT_SHARE)
        if wanted < 2 and config.regenerate_on_drift is not None:
            raise ValueError(
                "regenerate_on_drift needs at least 2 prompts that are not trained on, which are a tenth of all unless told "
                f"otherwise, and there are {different} different ones: set drift_prompts, or leave regenerate_on_drift out"
            )
        if wanted < 2:
            say(
                f"note: drift is not measured: a tenth of {different} prompts is less than the 2 that would be kept out of "
                "training for it; drift_prompts sets how many are"
            )
            wanted = 0
    if wanted >= different:
        raise ValueError(f"drift_prompts: {wanted} leaves none of {different} different prompts to train on: give fewer, or 0")
    out = held_out_places(list(dict.fromkeys(digests)), fraction=wanted / different, seed=config.training.seed)
    kept = {digests[place]: group for place, group in enumerate(prompts)}
    chosen = [digest for place, digest in enumerate(dict.fromkeys(digests)) if place in out]
    train = [group for digest, group in zip(digests, prompts, strict=True) if digest not in chosen]
    return train, [kept[digest] for digest in chosen]


def last_position(run: Run, last: Path | None) -> Position:
    """Restore the last checkpoint, if there is one."""
    if last is None:
        return Position()
    state = load_checkpoint(
        last,
        ONLINE_STATE,
        num_steps=run.total,
        model=run.engine.model,
        optimizer=run.optimizer,
        accelerator=run.accelerator,
        tensors=run.reference.state(),
    )
    refuse_other_run(last, state, weights=run.inputs["weights"], data=run.inputs["data"], what="the prompts")
    run.rounds = [dict(row) for row in state["rounds"]]
    run.say(f"Resuming from {last}")
    return Position(state["round"], state["start"], state["step"], state["ended"], state["loop"], state["pool"])


def _groups_digest(groups: Sequence[Group]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        # Of the metadata too: verifiers read them.
        metadata = json.dumps(group.metadata, sort_keys=True, default=str)
        digest.update(repr((group.id, group.prompt, group.candidates, group.tools, metadata)).encode(errors="surrogatepass"))
    return digest.hexdigest()


def save(run: Run, position: Position) -> None:
    """Write a checkpoint."""
    save_checkpoint(
        run.config.training.output_dir,
        position.step,
        model=run.engine.model,
        optimizer=run.optimizer,
        accelerator=run.accelerator,
        state={
            "round": position.round,
            "start": position.start,
            "ended": position.ended,
            "loop": position.loop,
            "pool": position.pool,
            "rounds": run.rounds,
            "weights": run.inputs["weights"],
            "data": run.inputs["data"],
            "groups_per_step": run.groups_per_step,
        },
        tensors=run.reference.state(),
    )
    delete_old(run.config.training.output_dir, run.accelerator, keep=run.config.training.save_total_limit)

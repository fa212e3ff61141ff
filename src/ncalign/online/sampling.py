"""A round's samples and their rewards, chunk by chunk: each process of a run samples and scores chunks of its own.

A chunk's samples and rewards are one file each, written whole when they are complete, so that a kill loses the chunks that were
under way. What a chunk holds depends on the seed, the round and its prompts alone, not on the process that samples it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ncalign.core.progress import Bar, say
from ncalign.data.groups import Group
from ncalign.generation.base import Completion, Generator, LeftOutPrompts, SamplingParams
from ncalign.generation.client import cancel_requests
from ncalign.generation.generate import completion_as_candidate, sample_prompts
from ncalign.model.encoding import DroppedGroupError
from ncalign.online.artefacts import MADE_ONCE, REWARDS, SAMPLES, Sample, read_artefact, write_artefact
from ncalign.online.clock import Clock
from ncalign.online.config import OnlineConfig
from ncalign.rewards.base import RewardSource, score_usable
from ncalign.training.peers import own_share, put_together

FRESH = "policy"
# Seconds.
_LOOK_AGAIN = 0.05


@dataclass
class ScoredSamples:
    """A prompt with its fresh completions and their rewards, None where there is none."""

    prompt: Group
    completions: list[Completion]
    rewards: list[float | None]


def sample_and_score(
    prompts: Sequence[Group],
    folder: Path,
    *,
    generator: Generator,
    source: RewardSource,
    config: OnlineConfig,
    seed: Callable[[int], int],
    clock: Clock,
    accelerator: Accelerator,
) -> list[ScoredSamples]:
    """Sample and score, chunk by chunk; one chunk is scored while the next is sampled.

    ``seed`` gives the seed of a chunk's sampling from its number; the files go to the round's ``folder``, which all processes
    see. Each process makes its share of the chunks, and gets what the others made.
    """
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    size = config.chunk_size
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    own = own_share(accelerator, len(chunks))
    sampled: dict[int, list[list[Completion]]] = {}
    scored: dict[int, Future[list[list[float | None]]]] = {}
    bar = Bar("Sampling prompts", sum(len(chunks[number]) for number in own), shown=accelerator.is_main_process)
    with ThreadPoolExecutor(1, thread_name_prefix="scoring") as pool, bar:
        try:
            for number in own:
                chunk = chunks[number]
                with clock.phase("generate"):
                    sampled[number] = _sampled(folder, number, chunk, generator, params, config, seed(number))
                scored[number] = pool.submit(_scored, folder, number, chunk, sampled[number], source, config, clock)
                bar.advance(len(chunk))
                _raise_failed([*scored.values()])
            with clock.phase("wait for scores"):
                found = {number: (sampled[number], future.result()) for number, future in scored.items()}
                made = put_together(accelerator, found)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            # Ctrl-C is raised here, and a judge is asked there; between two of its requests there is nothing to cancel.
            while isinstance(error, KeyboardInterrupt) and not all(future.done() for future in scored.values()):
                cancel_requests()
                time.sleep(_LOOK_AGAIN)
            raise
    return [
        ScoredSamples(*one)
        for chunk, (completions, rewards) in zip(chunks, made, strict=True)
        for one in zip(chunk, completions, rewards, strict=True)
    ]


def _raise_failed(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        if future.done():
            future.result()


def answers(
    groups: Sequence[Group], generator: Generator, config: OnlineConfig, *, num_samples: int, params: SamplingParams, seed: int
) -> list[list[Completion]]:
    """Completions of the groups' prompts; with ``on_bad_row: skip`` none for prompts that can't be answered.

    Raises:
        ValueError: a prompt can't be answered, and such are not to be left out.
    """
    left_out = LeftOutPrompts() if config.training.on_bad_row == "skip" else None
    found = sample_prompts(groups, generator, num_samples=num_samples, params=params, seed=seed, left_out=left_out)
    if left_out is not None and (notice := left_out.notice(f"{len(groups)} prompts asked")):
        say(notice)
    return found


def _sampled(
    folder: Path,
    number: int,
    chunk: Sequence[Group],
    generator: Generator,
    params: SamplingParams,
    config: OnlineConfig,
    seed: int,
) -> list[list[Completion]]:
    path = folder / f"generated-{number:05d}.json"
    if path.is_file():
        kept = read_artefact(path, SAMPLES, rows=len(chunk), remedy=MADE_ONCE)
        return [[_completion(entry) for entry in row] for row in kept]
    found = answers(chunk, generator, config, num_samples=config.num_samples, params=params, seed=seed)
    write_artefact([[_as_json(completion) for completion in row] for row in found], path)
    return found


def _as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "num_tokens": completion.num_tokens,
        "finished": completion.finished,
        "token_ids": None if completion.token_ids is None else list(completion.token_ids),
        "logprob": completion.logprob,
    }


def _completion(entry: Sample) -> Completion:
    ids = entry["token_ids"]
    return Completion(
        entry["text"],
        entry["num_tokens"],
        entry["finished"],
        token_ids=None if ids is None else tuple(ids),
        logprob=entry["logprob"],
    )


def _scored(
    folder: Path,
    number: int,
    chunk: Sequence[Group],
    sampled: Sequence[Sequence[Completion]],
    source: RewardSource,
    config: OnlineConfig,
    clock: Clock,
) -> list[list[float | None]]:
    path = folder / f"scored-{number:05d}.json"
    if path.is_file():
        return read_artefact(path, REWARDS, rows=len(chunk))
    with clock.phase("score"):
        found = _rewards(chunk, sampled, source, skip=config.training.on_bad_row == "skip")
    write_artefact(found, path)
    return found


def _rewards(
    groups: Sequence[Group], sampled: Sequence[Sequence[Completion]], source: RewardSource, *, skip: bool
) -> list[list[float | None]]:
    """One reward for each completion of each group; those without text have none.

    With ``skip``, neither have those of a group that can't be put to the source.
    """
    rewards: list[list[float | None]] = [[None] * len(completions) for completions in sampled]
    there = [[k for k, completion in enumerate(completions) if completion.text.strip()] for completions in sampled]
    asked = [g for g, columns in enumerate(there) if columns]
    filled = [
        replace(groups[g], candidates=[completion_as_candidate(groups[g], sampled[g][k], FRESH) for k in there[g]])
        for g in asked
    ]
    for g, found in zip(asked, score_usable(source, filled), strict=True):
        if isinstance(found, DroppedGroupError):
            if not skip:
                raise found
            say(f"note: not scored and left out: {found}")
            continue
        for k, reward in zip(there[g], found, strict=True):
            rewards[g][k] = reward
    return rewards

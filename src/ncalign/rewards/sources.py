"""Reward sources by their names: functions, verifiers, reward models and judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ncalign.core.cache import cache_folder
from ncalign.core.store import Store
from ncalign.rewards.base import RewardSource
from ncalign.rewards.config import JudgeConfig
from ncalign.rewards.function import FunctionReward, load_function
from ncalign.rewards.guard import Ensemble, Guarded
from ncalign.rewards.instructions import InstructionReward
from ncalign.rewards.judge import JudgeReward
from ncalign.rewards.verifiable import MathVerifyReward, ReasoningGymReward

_MODEL = "model:"
_VERIFIERS: dict[str, type[ReasoningGymReward | MathVerifyReward | InstructionReward]] = {
    "reasoning_gym": ReasoningGymReward,
    "math_verify": MathVerifyReward,
    "instructions": InstructionReward,
}


def reward_source(
    names: Sequence[str],
    *,
    combine: Literal["mean", "min"] = "mean",
    judge: JudgeConfig | None = None,
    batch_size: int = 16,
    timeout: float | None = None,
    max_failed_share: float = 0.0,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> RewardSource:
    """The source, or the ensemble of sources, of these names.

    The arguments are the fields of `ScoreConfig`: ``names`` is its ``reward``.

    Raises:
        ValueError: a name is of no known form, or what it names can't be loaded.
    """
    if (judge is not None) != ("judge" in names):
        raise ValueError("reward: judge and the section judge go together: give both or neither")

    def store(name: str) -> Store:
        return Store((cache_dir or cache_folder()) / f"{name}.sqlite")

    def source(name: str) -> RewardSource:
        if name == "judge":
            assert judge is not None
            return JudgeReward(judge, store("verdicts"))
        if name.startswith(_MODEL):
            from ncalign.rewards.model import ModelReward

            folder = name.removeprefix(_MODEL)
            return ModelReward(folder, batch_size=batch_size, store=store("reward-models"), trust_remote_code=trust_remote_code)
        checked = _VERIFIERS[name]() if name in _VERIFIERS else FunctionReward(load_function(name), repr(name))
        return Guarded(checked, timeout=timeout, max_failed_share=max_failed_share)

    sources = [source(name) for name in names]
    return sources[0] if len(sources) == 1 else Ensemble(sources, combine=combine)


def source_record(names: Sequence[str], *, combine: str, judge: JudgeConfig | None) -> str:
    """What is recorded of the source: for instance ``score: min of judge (pairwise) my-judge, model:my-reward-model``."""
    named = [f"judge ({judge.mode}) {judge.server.model}" if name == "judge" and judge is not None else name for name in names]
    return f"score: {named[0]}" if len(named) == 1 else f"score: {combine} of {', '.join(named)}"


def members(source: RewardSource) -> Sequence[RewardSource]:
    """The sources of an ensemble; of another source, itself."""
    return source.sources if isinstance(source, Ensemble) else (source,)


def check_failures(source: RewardSource) -> int:
    """How many candidates the sources failed on.

    Raises:
        ValueError: one failed on too many.
    """
    guarded = [one for one in members(source) if isinstance(one, Guarded)]
    for one in guarded:
        one.check()
    return sum(one.num_failed for one in guarded)

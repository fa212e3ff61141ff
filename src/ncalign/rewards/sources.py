"""The reward sources that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ncalign.core.cache import cache_folder
from ncalign.core.store import Store
from ncalign.rewards.base import RewardSource
from ncalign.rewards.config import ScoreConfig
from ncalign.rewards.function import FunctionReward, load_function
from ncalign.rewards.guard import Ensemble, Guarded
from ncalign.rewards.instructions import InstructionReward
from ncalign.rewards.judge import JudgeReward
from ncalign.rewards.math_answers import MathVerifyReward
from ncalign.rewards.verifiable import ReasoningGymReward

if TYPE_CHECKING:
    from ncalign.online.config import OnlineConfig

_MODEL = "model:"


def reward_source(config: ScoreConfig | OnlineConfig) -> RewardSource:
    """The source, or the ensemble of sources, that a configuration names.

    Raises:
        ValueError: a name is of no known form, or what it names can't be loaded.
    """
    if (config.judge is not None) != ("judge" in config.reward):
        raise ValueError("reward: judge and the section judge go together: give both or neither")
    sources = [_source(name, config) for name in config.reward]
    return sources[0] if len(sources) == 1 else Ensemble(sources, combine=config.combine)


def source_record(config: ScoreConfig | OnlineConfig) -> str:
    """What is recorded of the source: for instance ``score: min of judge (pairwise) my-judge, model:my-reward-model``."""
    judge = config.judge
    named = [f"judge ({judge.mode}) {judge.model}" if name == "judge" and judge is not None else name for name in config.reward]
    return f"score: {named[0]}" if len(named) == 1 else f"score: {config.combine} of {', '.join(named)}"


def _source(name: str, config: ScoreConfig | OnlineConfig) -> RewardSource:
    if name == "judge":
        assert config.judge is not None
        return JudgeReward(config.judge, _store(config, "verdicts"))
    if name.startswith(_MODEL):
        from ncalign.rewards.model import ModelReward

        return ModelReward(
            name.removeprefix(_MODEL),
            batch_size=config.reward_batch_size,
            store=_store(config, "reward-models"),
            trust_remote_code=config.trust_remote_code,
        )
    checked: dict[str, type[ReasoningGymReward | MathVerifyReward | InstructionReward]] = {
        "reasoning_gym": ReasoningGymReward,
        "math_verify": MathVerifyReward,
        "instructions": InstructionReward,
    }
    source = checked[name]() if name in checked else FunctionReward(load_function(name), repr(name))
    return Guarded(source, timeout=config.reward_timeout, max_failed_share=config.max_failed_share)


def _store(config: ScoreConfig | OnlineConfig, name: str) -> Store:
    return Store((config.cache_dir or cache_folder()) / f"{name}.sqlite")


def parts(source: RewardSource) -> Sequence[RewardSource]:
    """The sources of an ensemble, without what guards them."""
    inner = source.sources if isinstance(source, Ensemble) else (source,)
    return [one.source if isinstance(one, Guarded) else one for one in inner]


def check_failures(source: RewardSource) -> int:
    """How many candidates the sources failed on.

    Raises:
        ValueError: more than their share.
    """
    guarded = [one for one in (source.sources if isinstance(source, Ensemble) else (source,)) if isinstance(one, Guarded)]
    for one in guarded:
        one.check()
    return sum(one.num_failed for one in guarded)

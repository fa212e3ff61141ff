"""Reward sources by their names: functions, verifiers, reward models and judges."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from ncalign.core.cache import cache_folder, private_folder
from ncalign.core.code_digest import code_digest
from ncalign.core.store import Store
from ncalign.model.config import DType, Precision
from ncalign.rewards.base import RewardSource
from ncalign.rewards.config import RewardConfig
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


def reward_dtype(config: RewardConfig, dtype: DType) -> Precision | None:
    """The precision in which reward models compute; None where none is named, and nothing is to be decided."""
    if not any(name.startswith(_MODEL) for name in config.reward):
        return None
    from ncalign.model.precision import resolve_dtype

    return resolve_dtype(dtype)


def reward_source(
    config: RewardConfig,
    *,
    dtype: Precision | None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    today: date | None = None,
) -> RewardSource:
    """The source, or the ensemble of sources, that a configuration names.

    Args:
        config: names of sources, and how they are called.
        dtype: precision of reward models, as :func:`reward_dtype` gives it.
        cache_dir: where scores of judges and reward models are kept; default: the user's cache folder.
        trust_remote_code: run code that comes with a reward model.
        today: the date for reward models' chat templates that write it; None for that of the call.

    Raises:
        ValueError: a name is of no known form, or what it names can't be loaded.
    """
    names, judge, batch_size = config.reward, config.judge, config.reward_batch_size
    if (judge is not None) != ("judge" in names):
        raise ValueError("reward: judge and the section judge go together: give both or neither")

    def store(name: str) -> Store:
        return Store(private_folder(cache_dir or cache_folder()) / f"{name}.sqlite")

    def source(name: str) -> RewardSource:
        if name == "judge":
            assert judge is not None
            return JudgeReward(judge, store("verdicts"))
        if name.startswith(_MODEL):
            from ncalign.rewards.model import ModelReward

            assert dtype is not None
            return ModelReward(
                name.removeprefix(_MODEL),
                dtype=dtype,
                batch_size=batch_size,
                store=store("reward-models"),
                trust_remote_code=trust_remote_code,
                today=today,
            )
        checked = _VERIFIERS[name]() if name in _VERIFIERS else FunctionReward(load_function(name), repr(name))
        return Guarded(checked, timeout=config.reward_timeout, max_failed_share=config.max_failed_share)

    sources = [source(name) for name in names]
    return sources[0] if len(sources) == 1 else Ensemble(sources, combine=config.combine)


def source_record(config: RewardConfig) -> str:
    """What is recorded of the source: for instance ``score: min of judge (pairwise) my-judge, model:my-reward-model``."""
    judge = config.judge
    judged = {} if judge is None else {"judge": f"judge ({judge.mode}) {judge.server.model}"}
    named = [judged.get(name, name) for name in config.reward]
    return f"score: {named[0]}" if len(named) == 1 else f"score: {config.combine} of {', '.join(named)}"


def source_digests(config: RewardConfig, source: RewardSource) -> dict[str, str]:
    """Digests of what the files hold that a configuration's source reads, by what messages call them.

    Args:
        config: names of sources.
        source: what :func:`reward_source` made of it.
    """
    found: dict[str, str] = {}
    for name, part in zip(config.reward, members(source), strict=True):
        if isinstance(part, JudgeReward):
            template = config.judge.template if config.judge is not None else None
            found[f"judge.template {template or '(bundled)'}"] = Store.key(part.template)
        elif name.startswith(_MODEL):
            from ncalign.rewards.model import ModelReward

            assert isinstance(part, ModelReward)
            found[f"reward {name}"] = part.fingerprint()
        elif name not in _VERIFIERS:
            found[f"reward {name}"] = code_digest(name)
    return found


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

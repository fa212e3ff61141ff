"""Where rewards come from: a function, verifiers, a reward model, a judge, or several of them."""

from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.rewards.base import BatchRewardSource, RewardSource, score_many
    from ncalign.rewards.function import FunctionReward, load_function
    from ncalign.rewards.guard import Ensemble, Guarded
    from ncalign.rewards.instructions import InstructionReward
    from ncalign.rewards.judge import JudgeReward
    from ncalign.rewards.score import ScoreCounts, run_score, score_groups
    from ncalign.rewards.sources import check_failures, reward_source, source_record
    from ncalign.rewards.verifiable import MathVerifyReward, ReasoningGymReward

__all__ = [
    "BatchRewardSource",
    "Ensemble",
    "FunctionReward",
    "Guarded",
    "InstructionReward",
    "JudgeReward",
    "MathVerifyReward",
    "ReasoningGymReward",
    "RewardSource",
    "ScoreCounts",
    "check_failures",
    "load_function",
    "reward_source",
    "run_score",
    "score_groups",
    "score_many",
    "source_record",
]

__getattr__ = importer(
    __name__,
    {
        "BatchRewardSource": "ncalign.rewards.base",
        "Ensemble": "ncalign.rewards.guard",
        "FunctionReward": "ncalign.rewards.function",
        "Guarded": "ncalign.rewards.guard",
        "InstructionReward": "ncalign.rewards.instructions",
        "JudgeReward": "ncalign.rewards.judge",
        "MathVerifyReward": "ncalign.rewards.verifiable",
        "ReasoningGymReward": "ncalign.rewards.verifiable",
        "RewardSource": "ncalign.rewards.base",
        "ScoreCounts": "ncalign.rewards.score",
        "check_failures": "ncalign.rewards.sources",
        "load_function": "ncalign.rewards.function",
        "reward_source": "ncalign.rewards.sources",
        "run_score": "ncalign.rewards.score",
        "score_groups": "ncalign.rewards.score",
        "score_many": "ncalign.rewards.base",
        "source_record": "ncalign.rewards.sources",
    },
)

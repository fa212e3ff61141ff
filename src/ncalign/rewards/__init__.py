"""Where rewards come from: a function, verifiers, a reward model, a judge, or several of them."""

from ncalign.rewards.adjust import run_adjust
from ncalign.rewards.base import RewardSource, score_many
from ncalign.rewards.function import FunctionReward, load_function
from ncalign.rewards.guard import Ensemble, Guarded
from ncalign.rewards.instructions import InstructionReward
from ncalign.rewards.judge import JudgeReward
from ncalign.rewards.math_answers import MathVerifyReward
from ncalign.rewards.run import ScoreCounts, run_score, score_groups
from ncalign.rewards.sources import check_failures, reward_source, source_record
from ncalign.rewards.verifiable import ReasoningGymReward

__all__ = [
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
    "run_adjust",
    "run_score",
    "score_groups",
    "score_many",
    "source_record",
]

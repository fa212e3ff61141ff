"""Scoring candidates: the `RewardSource` protocol, and functions, verifiers, reward models and judges behind it."""

from ncalign.core.lazy import importer

__getattr__ = importer(
    __name__,
    base="BatchRewardSource RewardSource score_many",
    guard="Ensemble Guarded",
    function="FunctionReward load_function",
    instructions="InstructionReward",
    judge="JudgeReward",
    verifiable="MathVerifyReward ReasoningGymReward",
    score="ScoreCounts run_score score_groups",
    sources="check_failures reward_source source_record",
)

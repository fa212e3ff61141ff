"""What the configurations of methods share: their base, and the types of common fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Base of every method's configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


DrawnStrategy = Literal["mc", "max", "min", "uniform", "sweet_spot"]
Strategy = DrawnStrategy | Literal["all"]


Pairing = Annotated[
    Literal["best_vs_one", "best_vs_each", "best_vs_worst", "best_vs_hard", "best_vs_sweet_spot", "all_pairs"],
    Field(
        description="The best against one random lower-scored candidate, each of them, the lowest-scored, one drawn by MC-PO's "
        "kernel, or the one nearest to two standard deviations below the mean reward; or all pairs."
    ),
]


Beta = Annotated[float, Field(gt=0, description="Scale of the log-ratio: implicit reward = beta * log(policy/reference).")]


Alpha = Annotated[
    float, Field(gt=0, description="Reward temperature: target weights are softmax(reward / alpha) within a group.")
]

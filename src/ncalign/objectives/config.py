"""What the configurations of methods share: their base, and the types of common fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from ncalign.objectives.method import Method


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


class EstimatorConfig(Frozen):
    """How a whole group's gradient is estimated from a few of its candidates."""

    candidates: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="S, how many of a group pass through the model with gradients; auto: that at which variance times time is "
        "least, by the training set's coefficients at the start.",
    )

    proposals: Literal["current", "last_visit", "uniform"] = Field(
        "current",
        description="What candidates are drawn by: current coefficients, from a pass that scores all of them; or, without "
        "that pass and for losses of each candidate by itself (nca, kto, qrpo), those of each one's last visit, or nothing.",
    )

    @property
    def number(self) -> int | None:
        """S; None where it is found from the training set."""
        return None if self.candidates == "auto" else self.candidates


Estimate = Annotated[
    EstimatorConfig | None,
    Field(description="Estimate the gradient from a few of a group's candidates, drawn and weighted to be exact on average."),
]


class WholeGroup(Frozen):
    """Base of the methods whose loss may read every candidate of a group."""

    name: str = ""
    beta: Beta = 0.1
    estimator: Estimate = None

    if TYPE_CHECKING:

        def method(self) -> Method: ...

    @model_validator(mode="after")
    def _estimator_is_possible(self) -> WholeGroup:
        """Refuse, before any data is read, an estimator of what is drawn already."""
        if self.estimator is not None:
            self.method().estimated(self.estimator.number, self.estimator.proposals)
        return self

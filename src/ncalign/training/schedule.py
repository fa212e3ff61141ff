"""Learning rate and data order as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ncalign.model.batching import epoch_order


def learning_rate_at(step: int, *, peak: float, num_steps: int, warmup_ratio: float, kind: str) -> float:
    """The learning rate of a step: a linear rise over the warm-up, then constant, linear to 0, or half a cosine to 0.

    Args:
        step: counted from 0.
        peak: the highest learning rate.
        num_steps: steps in all.
        warmup_ratio: share of the steps in the rise.
        kind: ``cosine``, ``linear`` or ``constant``.

    Example:
        >>> [learning_rate_at(s, peak=1.0, num_steps=4, warmup_ratio=0.5, kind="linear") for s in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if kind == "constant":
        return peak
    return peak * (1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class DataPlan:
    """Which groups each optimizer step sees.

    Attributes:
        num_groups: groups in the data.
        groups_per_step: the global batch: groups of all passes and processes in one step.
        num_steps: the step that the plan ends before.
        seed: of the order.
        first_step: the step that the plan begins with.
    """

    num_groups: int
    groups_per_step: int
    num_steps: int
    seed: int
    first_step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may hold fewer groups."""
        return math.ceil(self.num_groups / self.groups_per_step)

    def step_groups(self, step: int) -> tuple[int, list[int]]:
        """The epoch of a step and the indices of its groups."""
        epoch, within = divmod(step - self.first_step, self.steps_per_epoch)
        order = epoch_order(self.num_groups, epoch=epoch, seed=self.seed)
        return epoch, order[within * self.groups_per_step : (within + 1) * self.groups_per_step]


def make_plan(num_groups: int, *, groups_per_step: int, num_train_epochs: float, max_steps: int, seed: int) -> DataPlan:
    """A plan of ``max_steps`` steps, or of as many as the epochs take."""
    steps = max_steps if max_steps > 0 else math.ceil(num_train_epochs * math.ceil(num_groups / groups_per_step))
    return DataPlan(num_groups, groups_per_step, steps, seed)

"""The best evaluation of a run by a metric, and when to stop waiting for a better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ncalign.training.saved import BestState

_PREFIX = "eval/"


@dataclass
class Best:
    """Compares evaluations by a metric, as transformers' trainer and its early stopping do.

    The evaluation before the first step is not compared: no checkpoint of it exists. A metric that is no number is no
    improvement.

    Args:
        metric: its name, with or without ``eval/`` (or ``eval_``) in front.
        greater: whether more is better; None: unless the name ends in ``loss``.
        patience: evaluations without improvement, one after the other, after which training stops; None for no stopping.
        threshold: an improvement must be larger to count for the patience.

    Attributes:
        step: of the best evaluation; 0 before the first.
        row: of the best evaluation, as it was logged.
        waited: evaluations since the last improvement.
        last: the last evaluation.

    >>> best = Best("loss", patience=1)
    >>> [best.observe({"step": step, "eval/loss": loss}) for step, loss in ((1, 0.7), (2, 0.6), (3, 0.65))]
    [True, True, False]
    >>> best.step, best.value, best.exhausted
    (2, 0.6, True)
    """

    metric: str
    greater: bool | None = None
    patience: int | None = None
    threshold: float = 0.0
    step: int = 0
    row: dict[str, float] | None = None
    waited: int = 0
    last: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Bring the name to the form in which it is logged."""
        bare = self.metric.removeprefix(_PREFIX).removeprefix("eval_")
        self.metric = _PREFIX + bare
        if self.greater is None:
            self.greater = not bare.endswith("loss")

    @property
    def value(self) -> float | None:
        """The metric of the best evaluation; None before the first."""
        return None if self.row is None else self.row[self.metric]

    @property
    def exhausted(self) -> bool:
        """Whether training is to stop."""
        return self.patience is not None and self.waited >= self.patience

    def check(self, row: Mapping[str, float]) -> None:
        """Refuse a metric that evaluations don't have.

        Raises:
            ValueError: ``row``, an evaluation, lacks it.
        """
        if self.metric not in row:
            known = ", ".join(sorted(name.removeprefix(_PREFIX) for name in row if name.startswith(_PREFIX)))
            raise ValueError(
                f"metric_for_best_model: no evaluation has {self.metric.removeprefix(_PREFIX)!r}; they have {known}"
            )

    def observe(self, row: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best so far; returns whether it is better.

        Raises:
            ValueError: it lacks the metric.
        """
        self.check(row)
        found, before = row[self.metric], self.value
        gain = 0.0 if before is None else (found - before) * (1 if self.greater else -1)
        better = found == found and (before is None or gain > 0)
        self.waited = 0 if better and (before is None or gain > self.threshold) else self.waited + 1
        self.last = dict(row)
        if better:
            self.step, self.row = int(row["step"]), self.last
        return better

    def forget(self) -> None:
        """Take the next evaluation for the best: nothing is left of the one that was."""
        self.step, self.row = 0, None

    def result(self) -> dict[str, object]:
        """The best evaluation, for results.json."""
        return {"step": self.step, "metric": self.metric, "value": self.value}

    def text(self) -> str:
        """Why training stops."""
        found = "none is a number" if self.value is None else f"the best is {self.value:.6g}, at step {self.step}"
        return f"no better {self.metric} in {self.waited} evaluations; {found}"

    def state(self) -> BestState:
        """What a resumed run needs; JSON values."""
        return {"step": self.step, "row": self.row, "waited": self.waited, "last": self.last}

    def restore(self, state: BestState) -> None:
        """Take over from :meth:`state`."""
        self.step, self.row, self.waited, self.last = state["step"], state["row"], state["waited"], state["last"]

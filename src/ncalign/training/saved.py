"""The forms of what a run writes and reads again: its checkpoints' states and its results."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, Strict, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

Number: TypeAlias = int | float
Count: TypeAlias = Annotated[int, Strict(), Field(ge=0)]
Numbers: TypeAlias = dict[str, Number]
_MORE = ConfigDict(extra="allow")


class Alarm(TypedDict):
    """What the alarm about falling log-probs has seen."""

    history: list[Number]
    rung: bool


class LastVisitsState(TypedDict):
    """:meth:`ncalign.training.last_visits.LastVisits.state`: lists of one length."""

    rows: list[Count]
    columns: list[Count]
    steps: list[Count]
    logprobs: list[Number]


class BestState(TypedDict):
    """:meth:`ncalign.training.best.Best.state`."""

    step: Count
    row: Numbers | None
    waited: Count
    last: Numbers | None


class LoopState(TypedDict):
    """:meth:`ncalign.training.loop.Loop.state`."""

    sums: Numbers
    counts: Numbers
    alarm: Alarm
    last: Numbers
    seen: Annotated[list[Number], Field(min_length=2, max_length=2)]
    last_visits: NotRequired[LastVisitsState]
    best: NotRequired[BestState]


class SavedState(TypedDict):
    """What every checkpoint holds besides tensors."""

    step: Count
    weights: str
    data: str


class TrainState(SavedState):
    """Of `train`."""

    before: Numbers | None
    seconds: Number
    loop: LoopState
    groups_per_step: NotRequired[Annotated[int, Strict(), Field(ge=1)]]


@with_config(_MORE)
class RoundRow(TypedDict):
    """A finished round, as ``round.json`` has it."""

    round: Count
    start: Count
    end: Count
    counts: Numbers
    health: Numbers
    drift: dict[str, Any] | None
    alarms: list[str]
    seconds: Numbers


class OnlineState(SavedState):
    """Of `online`."""

    round: Count
    start: Count
    ended: bool
    loop: LoopState | None
    pool: str | None
    rounds: list[RoundRow]
    groups_per_step: NotRequired[Annotated[int, Strict(), Field(ge=1)]]


@with_config(_MORE)
class _Versions(TypedDict):
    ncalign: str


@with_config(_MORE)
class _Data(TypedDict):
    groups_trained_on: Count
    candidates_used: Count


@with_config(_MORE)
class Results(TypedDict):
    """What of ``results.json`` is read again."""

    method: str
    data: _Data
    before: dict[str, Any] | None
    after: dict[str, Any]
    versions: _Versions


@with_config(_MORE)
class StepSize(TypedDict):
    """What of a checkpoint's state is read before the run's steps are planned."""

    groups_per_step: NotRequired[Annotated[int, Strict(), Field(ge=1)]]


STEP_SIZE = TypeAdapter(StepSize)
TRAIN_STATE, ONLINE_STATE, RESULTS = TypeAdapter(TrainState), TypeAdapter(OnlineState), TypeAdapter(Results)

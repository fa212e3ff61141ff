"""When rounds begin and end, and which prompts they answer: functions of the step, so that nothing needs to be saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ncalign.model.batching import epoch_order


def num_steps(num_prompts: int, *, groups_per_step: int, num_train_epochs: float, max_steps: int) -> int:
    """Optimizer steps of the run: ``max_steps``, or as many as visit each prompt ``num_train_epochs`` times."""
    return max_steps if max_steps > 0 else math.ceil(num_train_epochs * math.ceil(num_prompts / groups_per_step))


def round_end(start: int, *, total: int, every: int | None, shares: Sequence[float]) -> int:
    """The step that the round beginning at ``start`` ends before, unless drift ends it sooner.

    Example:
        >>> [round_end(step, total=10, every=None, shares=(1 / 3, 2 / 3)) for step in (0, 2, 3, 7)]
        [3, 3, 7, 10]
        >>> round_end(4, total=10, every=4, shares=())
        8
    """
    if every is not None:
        return min(start + every, total)
    return min((at for share in shares if (at := round(share * total)) > start), default=total)


def round_prompts(start: int, *, count: int, groups_per_step: int, num_prompts: int, seed: int) -> list[int]:
    """Indices of the prompts that a round answers: the next ones in the epochs' random orders, each once.

    Example:
        >>> first, second = (round_prompts(s, count=4, groups_per_step=2, num_prompts=8, seed=0) for s in (0, 2))
        >>> sorted(first + second)
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    position, count = start * groups_per_step, min(count, num_prompts)
    epochs = range(position // num_prompts, (position + count - 1) // num_prompts + 1)
    stream = [index for epoch in epochs for index in epoch_order(num_prompts, epoch=epoch, seed=seed)]
    first = position % num_prompts
    return list(dict.fromkeys(stream[first : first + count]))

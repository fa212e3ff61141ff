"""The check before the first step knows rounding from references that are off."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ncalign.model.batching import GroupBatch
from ncalign.model.layout import Span
from ncalign.objectives import MCPO
from ncalign.training.selfcheck import TOLERANCES, check_first_step

LENGTH = 25
ROOT = LENGTH**0.5


def batch_with(reference: Tensor) -> GroupBatch:
    rows, number = reference.shape
    lengths = torch.full((rows, number), LENGTH)
    spans = tuple(Span(0, 1, (LENGTH,) * number) for _ in range(rows))
    rewards = torch.arange(float(number), dtype=torch.float64).expand(rows, -1)
    ids = tuple(f"g{row}" for row in range(rows))
    return GroupBatch(ids, lengths > 0, rewards, reference, lengths, torch.zeros(1, dtype=torch.long), spans, pad_token_id=0)


def checked(off_by: float, *, rounding: float) -> int:
    """Check a policy whose stored references are off by ``off_by`` nats a root of a token; how many passes it took.

    ``rounding`` sets a candidate computed without the others that far from itself.
    """
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    policy = torch.full((2, 3), -40.0)
    calls = 0

    def fresh(read: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        if read is None:
            return policy
        return (policy + rounding * ROOT * signs).masked_fill(read < 0, float("nan"))

    check = partial(check_first_step, MCPO().method(), batch_with(policy + off_by * ROOT * signs), policy=policy)
    check(fresh_reference=fresh, dtype="bfloat16", source="the data", agreed=lambda off: off)
    return calls


def test_what_the_model_itself_rounds_by_is_no_error() -> None:
    typical = TOLERANCES["bfloat16"].typical
    assert checked(0.9 * typical, rounding=0.0) == 0
    # Token swaps, on a processor whose products are the same bits in batches of any shape but one.
    assert checked(0.07, rounding=0.0) == 0
    # All candidates once, then each of the three columns without the others.
    assert checked(2.9 * typical, rounding=typical) == 4


@pytest.mark.parametrize("rounding", [0.0, 0.5, 1.0])
def test_more_than_three_times_that_is_one(rounding: float) -> None:
    typical = TOLERANCES["bfloat16"].typical
    with pytest.raises(ValueError, match=r"reference log-probs are off .* the data says"):
        checked(3.1 * typical, rounding=rounding * typical)

"""How many of a group's candidates an estimator draws, where that is left to the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ncalign.model.encoding import EncodedGroup
from ncalign.objectives.estimators import best_number
from ncalign.training.engine import Engine
from ncalign.training.peers import say_first

_AT_A_TIME = 4096


def with_candidates(engine: Engine, groups: Sequence[EncodedGroup]) -> Engine:
    """The engine with the number of candidates that its estimator draws known, found from groups with reference log-probs.

    It depends on nothing but the groups, the method and the costs of the model, so that a resumed run finds it again.
    """
    if engine.method.estimator is None or engine.method.estimator.candidates is not None:
        return engine
    width = max(len(group.completions) for group in groups)
    found, lengths = torch.zeros(2, len(groups), width, dtype=torch.float64)
    prompts = torch.tensor([float(len(group.prompt)) for group in groups], dtype=torch.float64)
    for first in range(0, len(groups), _AT_A_TIME):
        some = groups[first : first + _AT_A_TIME]
        part = engine.reference_coefficients(some)
        found[first : first + len(some), : part.shape[1]] = part
        for row, group in zip(lengths[first:], some, strict=False):
            row[: len(group.completions)] = torch.tensor([float(len(one)) for one in group.completions])
    number, ratio = best_number(found, prompts, lengths * engine.token_cost, prompt_passes=3.0 if engine.prompts_once else 4.0)
    what = "all, since no fewer pay" if number >= width else f"{number} of up to {width}"
    say_first(
        engine.accelerator,
        f"note: estimator: candidates with gradients: {what} (variance times cost: {ratio:.2f} of the whole groups')",
    )
    return replace(engine, method=engine.method.estimated(number))

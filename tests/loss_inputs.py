"""Inputs of a method's loss for tests that choose the log-ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from ncalign.objectives import LossInputs


def inputs_of_one_token(log_ratios: Tensor, rewards: Tensor, mask: Tensor) -> LossInputs:
    """Candidates of one token each under a reference that gives them log-prob 0."""
    ratios = torch.where(mask, log_ratios, 0.0)
    return LossInputs(ratios, ratios, rewards, torch.ones_like(ratios), mask)

"""Every outcome of a systematic draw, with its probability."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise, permutations

import torch
from torch import Tensor

from ncalign.objectives.inclusion import systematic_from


def outcomes(expected: Tensor, sides: Tensor | None = None) -> list[tuple[float, Tensor]]:
    """Every result of a systematic draw for one row, with its probability: all orders, and the starts where one changes.

    With ``sides`` only the orders in which those that are True come last.
    """
    drawn = expected.nonzero().flatten().tolist()
    orders, starts, shares = [], [], []
    kinds = torch.zeros_like(expected) if sides is None else sides
    all_orders = [order for order in permutations(drawn) if bool((kinds[list(order)].float().diff() >= 0).all())]
    for order in all_orders:
        edges = (expected[list(order)] % 1).cumsum(0)
        cuts = torch.cat([torch.zeros(1), edges % 1, torch.ones(1)]).unique().tolist()
        for low, high in pairwise(cuts):
            if high - low > 1e-12:
                orders.append(order)
                starts.append((low + high) / 2)
                shares.append((high - low) / len(all_orders))
    laid = torch.tensor(orders, dtype=torch.long).view(len(orders), len(drawn))
    counts = torch.zeros(len(orders), len(expected), dtype=torch.long)
    counts.scatter_(1, laid, systematic_from(expected[laid], torch.tensor(starts, dtype=torch.float64)))
    found: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for row, share in zip(counts.tolist(), shares, strict=True):
        found[tuple(row)] += share
    return [(share, torch.tensor(row)) for row, share in found.items()]

"""Objectives: pure losses on `[B, K]` tensors, and the methods composed of them.

Each file of losses holds its methods' configurations too and ends with their union: adding a method touches that file alone.
"""

from typing import Annotated

from pydantic import Field

from ncalign.objectives import anchored, binary, estimators, lists, method, mix, pairs, ranking, regression, samplers, targets
from ncalign.objectives.anchored import *
from ncalign.objectives.binary import *
from ncalign.objectives.config import WholeGroup
from ncalign.objectives.estimators import *
from ncalign.objectives.lists import *
from ncalign.objectives.method import *
from ncalign.objectives.mix import *
from ncalign.objectives.pairs import *
from ncalign.objectives.ranking import *
from ncalign.objectives.regression import *
from ncalign.objectives.samplers import *
from ncalign.objectives.targets import *

ObjectiveConfig = Annotated[
    ranking.Config | lists.Config | binary.Config | pairs.Config | anchored.Config | regression.Config | mix.Config,
    Field(discriminator="name"),
]


def build_method(config: ObjectiveConfig) -> method.Method:
    """The method that a configuration names.

    Args:
        config: One of the objective configurations.

    Returns:
        Its sampler, its loss, and what a group must have.

    Example:
        >>> import torch
        >>> method = build_method(MCPO(beta=0.5))
        >>> rewards, mask = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[True, True, False]])
        >>> method.sampler.select(torch.zeros(1, 3), rewards, mask, torch.Generator().manual_seed(0))
        tensor([[1, 0]])
    """
    estimator = config.estimator if isinstance(config, WholeGroup | mix.Mix) else None
    made = config.method()
    return made if estimator is None else made.estimated(estimator.number, estimator.proposals)


__all__ = ["ObjectiveConfig", "build_method"]
__all__ += ranking.__all__
__all__ += lists.__all__
__all__ += binary.__all__
__all__ += pairs.__all__
__all__ += anchored.__all__
__all__ += regression.__all__
__all__ += mix.__all__
__all__ += targets.__all__
__all__ += samplers.__all__
__all__ += estimators.__all__
__all__ += method.__all__

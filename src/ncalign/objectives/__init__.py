"""Objectives: pure losses on `[B, K]` tensors, and the methods composed of them.

Each file of losses holds its methods' configurations too and ends with their union: adding a method touches that file alone.
"""

from typing import Annotated

from pydantic import Field

from ncalign.objectives import anchored, binary, lists, pairs, ranking, regression
from ncalign.objectives.anchored import DPOP, APODown, APOZero, CalDPO, apo_down_loss, apo_zero_loss, cal_dpo_loss, dpop_loss
from ncalign.objectives.binary import (
    BCO,
    KTO,
    NCA,
    BiasedNCA,
    NCAPair,
    bco_loss,
    biased_nca_loss,
    kto_loss,
    log_normalizer,
    nca_loss,
    nca_pair_loss,
    nca_weighted_loss,
    normalized_weights,
)
from ncalign.objectives.lists import EXO, HPS, SWEPO, LiPOLambda, exo_loss, hps_loss, lipo_lambda_loss, swepo_loss
from ncalign.objectives.method import (
    Baseline,
    Hooks,
    LossInputs,
    Method,
    PairConfig,
    chosen_nll,
    compose,
    log_ratio,
    mean_log_ratio,
    mean_logprob,
    mean_over_negatives,
    mean_over_pairs,
    needs_candidates,
    needs_preference,
    policy_logprob,
)
from ncalign.objectives.pairs import (
    CPO,
    DPO,
    RPO,
    EXOPair,
    RewardAwareRPO,
    SimPO,
    dpo_loss,
    exo_pair_loss,
    reward_aware_rpo_loss,
    simpo_loss,
)
from ncalign.objectives.ranking import (
    MCPO,
    RNCE,
    ContrastiveDivergence,
    InfoNCA,
    info_nca_loss,
    info_nca_weighted_loss,
    linear_contrast_loss,
    rnce_loss,
)
from ncalign.objectives.regression import IPO, QRPO, REBEL, SPPOHard, ipo_loss, qrpo_loss, rebel_loss, sppo_hard_loss
from ncalign.objectives.samplers import Sampler, all_below, mc_sampler, one_below, some_below, worst_below
from ncalign.objectives.targets import target_weights

ObjectiveConfig = Annotated[
    ranking.Config | lists.Config | binary.Config | pairs.Config | anchored.Config | regression.Config,
    Field(discriminator="name"),
]


def build_method(config: ObjectiveConfig) -> Method:
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
    return config.method()


__all__ = [
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "biased_nca_loss",
    "cal_dpo_loss",
    "dpo_loss",
    "dpop_loss",
    "exo_loss",
    "exo_pair_loss",
    "hps_loss",
    "info_nca_loss",
    "info_nca_weighted_loss",
    "ipo_loss",
    "kto_loss",
    "linear_contrast_loss",
    "lipo_lambda_loss",
    "nca_loss",
    "nca_pair_loss",
    "nca_weighted_loss",
    "qrpo_loss",
    "rebel_loss",
    "reward_aware_rpo_loss",
    "rnce_loss",
    "simpo_loss",
    "sppo_hard_loss",
    "swepo_loss",
    "target_weights",
    "log_normalizer",
    "normalized_weights",
    "all_below",
    "build_method",
    "chosen_nll",
    "compose",
    "log_ratio",
    "mc_sampler",
    "mean_log_ratio",
    "mean_logprob",
    "mean_over_negatives",
    "mean_over_pairs",
    "needs_candidates",
    "needs_preference",
    "one_below",
    "policy_logprob",
    "some_below",
    "worst_below",
    "APODown",
    "APOZero",
    "BCO",
    "Baseline",
    "BiasedNCA",
    "CPO",
    "CalDPO",
    "ContrastiveDivergence",
    "DPO",
    "DPOP",
    "EXO",
    "EXOPair",
    "LossInputs",
    "HPS",
    "Hooks",
    "IPO",
    "InfoNCA",
    "KTO",
    "LiPOLambda",
    "MCPO",
    "Method",
    "NCA",
    "NCAPair",
    "ObjectiveConfig",
    "PairConfig",
    "QRPO",
    "REBEL",
    "RNCE",
    "RPO",
    "RewardAwareRPO",
    "SPPOHard",
    "SWEPO",
    "Sampler",
    "SimPO",
]

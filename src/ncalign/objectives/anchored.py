"""Losses of a pair that hold on to the level of the implicit rewards and not only to their difference: APO, DPOP, Cal-DPO.

What they add to DPO keeps the chosen completion's likelihood from falling along with the rejected one's. `[B]` in, `[B]` out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ncalign.objectives.config import Beta
from ncalign.objectives.method import Method, PairConfig
from ncalign.objectives.targets import working_precision

__all__ = ["apo_zero_loss", "apo_down_loss", "dpop_loss", "cal_dpo_loss", "APOZero", "APODown", "DPOP", "CalDPO"]


def apo_zero_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    r"""APO-zero: the chosen completion up and the rejected one down, each by itself.

    $$\ell = 1 - \sigma(r_w) + \sigma(r_l)$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.

    Returns:
        Loss of each pair, between 0 and 2; 1 where both are 0.

    Example:
        >>> apo_zero_loss(torch.zeros(1), torch.zeros(1))
        tensor([1.])

    Source:
        APO, arXiv 2408.06266, equation 7.
    """
    return torch.sigmoid(-working_precision(chosen)) + torch.sigmoid(working_precision(rejected))


def apo_down_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    r"""APO-down: the chosen completion down, and the rejected one further, for models that are better than both.

    $$\ell = \sigma(r_w) + 1 - \sigma(r_w - r_l)$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.

    Returns:
        Loss of each pair, between 0 and 2; 1 where both are 0.

    Example:
        >>> apo_down_loss(torch.zeros(1), torch.zeros(1))
        tensor([1.])

    Source:
        APO, arXiv 2408.06266, equation 8.
    """
    preferred, other = working_precision(chosen), working_precision(rejected)
    return torch.sigmoid(preferred) + torch.sigmoid(other - preferred)


def dpop_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, penalty: float) -> Float[Tensor, " P"]:
    r"""DPO-positive: DPO with a penalty inside for a chosen completion that became less likely than under the reference.

    $$\ell = -\log \sigma(r_w - r_l - \lambda \max(0, -r_w))$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.
        penalty: $\lambda$, dimensionless: the shortfall is in implicit reward, beta included.

    Returns:
        Loss of each pair; $\ln 2$ where both are 0.

    Example:
        >>> import math
        >>> dpop_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), penalty=2.0)  # 2 - 2: log 2
        tensor([0.6931])

    Source:
        Smaug, arXiv 2402.13228, equation 3.
    """
    preferred = working_precision(chosen)
    return -F.logsigmoid(preferred - working_precision(rejected) - penalty * F.relu(-preferred))


def cal_dpo_loss(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, beta: float) -> Float[Tensor, " P"]:
    r"""Cal-DPO: a logistic loss of log-ratios, each drawn to the level that a reward of plus or minus one half calls for.

    $$\ell = -\log \sigma\left(\frac{r_w - r_l}{\beta}\right) + \frac12 \left(\frac{r_w}{\beta} - \frac{1}{2\beta}\right)^2
        + \frac12 \left(\frac{r_l}{\beta} + \frac{1}{2\beta}\right)^2$$

    Args:
        chosen: Implicit reward $r_w$ of each pair's preferred completion, dimensionless.
        rejected: Implicit reward $r_l$ of the other.
        beta: Scale of the log-ratio, which is taken out again: it decides only where the log-ratios are drawn to.

    Returns:
        Loss of each pair; its calibration is 0 at $r_w = 1/2$ and $r_l = -1/2$.

    Example:
        >>> cal_dpo_loss(torch.tensor([0.5]), torch.tensor([-0.5]), beta=1.0)  # log(1 + 1/e)
        tensor([0.3133])

    Source:
        Cal-DPO, arXiv 2412.14516, as its authors' code has it: no beta in the logistic term, half of the squares.
    """
    preferred, other = working_precision(chosen), working_precision(rejected)
    calibration = ((preferred - 0.5) / beta).square() + ((other + 0.5) / beta).square()
    return -F.logsigmoid((preferred - other) / beta) + 0.5 * calibration


class APOZero(PairConfig):
    """APO-zero: chosen up and rejected down, each by itself (arXiv 2408.06266)."""

    name: Literal["apo_zero"] = "apo_zero"

    def method(self) -> Method:
        return replace(self.pairs(apo_zero_loss), separable=True)


class APODown(PairConfig):
    """APO-down: both down, the rejected one further (arXiv 2408.06266)."""

    name: Literal["apo_down"] = "apo_down"

    def method(self) -> Method:
        return self.pairs(apo_down_loss)


class DPOP(PairConfig):
    """DPOP: DPO with a penalty for a chosen completion below its reference (Smaug, arXiv 2402.13228)."""

    name: Literal["dpop"] = "dpop"
    beta: Beta = 0.3
    penalty: float = Field(50.0, ge=0, description="Weight of the chosen completion's shortfall below the reference.")

    def method(self) -> Method:
        return self.pairs(partial(dpop_loss, penalty=self.penalty))


class CalDPO(PairConfig):
    """Cal-DPO: a logistic loss of log-ratios calibrated to rewards of plus and minus one half (arXiv 2412.14516)."""

    name: Literal["cal_dpo"] = "cal_dpo"

    def method(self) -> Method:
        return self.pairs(partial(cal_dpo_loss, beta=self.beta))


Config = APOZero | APODown | DPOP | CalDPO

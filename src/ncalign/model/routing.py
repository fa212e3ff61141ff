"""The routers of mixture-of-experts models: how much each expert is used, and the loss that balances it.

What a pass used is told for each completion, over all tokens of a row that it would have to itself: its prompt's and its own.
A prompt that is computed once is in each of its completions' sums, so that nothing depends on how tokens are laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

_SAME = 1e-2
"""How far the loss may be from the model's own, which may be rounded to bfloat16; with another formula it is far off."""


@dataclass(frozen=True)
class RouterLoss:
    """The router loss that training adds.

    Attributes:
        coefficient: the loss's weight in the training loss.
        experts_per_token: experts that a router picks for a token.
    """

    coefficient: float
    experts_per_token: int


def expert_use(
    router_logits: Sequence[Float[Tensor, "*shape E"]], pieces: Sequence[int], *, experts_per_token: int
) -> Float[Tensor, "P 2 E"]:
    """How often each expert was picked, and the sum of its probabilities, over the layers' tokens of each piece of a row.

    Args:
        router_logits: of each layer with a router, ``[N, E]`` or of a shape that flattens to it.
        pieces: tokens of each piece, in the tokens' order; N in all.
        experts_per_token: experts that a router picks for a token.

    Returns:
        Counts, then probabilities, through which gradients flow.

    Example:
        >>> expert_use([torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])], [1, 2], experts_per_token=1)[:, 0]
        tensor([[1., 0.],
                [1., 1.]])
    """
    experts, device = router_logits[0].shape[-1], router_logits[0].device
    dtype = torch.promote_types(router_logits[0].dtype, torch.float32)
    picked = probabilities = torch.zeros(sum(pieces), experts, dtype=dtype, device=device)
    for logits in router_logits:
        of_layer = logits.reshape(-1, experts).to(device, dtype).softmax(-1)
        chosen = of_layer.detach().topk(experts_per_token, dim=-1).indices
        picked = picked + torch.zeros_like(picked).scatter_(1, chosen, 1.0)
        probabilities = probabilities + of_layer
    owners = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(pieces)).to(device)
    use = torch.stack([picked, probabilities], dim=1)
    return use.new_zeros(len(pieces), 2, experts).index_add(0, owners, use)


def load_balancing_loss(use: Float[Tensor, "... 2 E"], *, experts_per_token: int) -> Float[Tensor, ""]:
    """Switch Transformer's auxiliary loss over all that is given: ``E Σ_e f_e P_e``; 0 where there are no tokens.

    ``f_e`` is how often expert e was picked and ``P_e`` its probability, each the mean over tokens and layers. Balanced routers
    give ``experts_per_token``.

    Args:
        use: as :func:`expert_use` tells it.
        experts_per_token: experts that a router picks for a token.

    Example:
        >>> use = torch.tensor([[[2.0, 2.0], [2.0, 2.0]]])  # four tokens, one expert each
        >>> load_balancing_loss(use, experts_per_token=1)
        tensor(1.)

    Source: Fedus et al. 2021 (arXiv 2101.03961), equations (4) to (6), as transformers' ``load_balancing_loss_func``.
    """
    picked, probabilities = use.flatten(0, -3).sum(0)
    tokens = (picked.sum() / experts_per_token).clamp(min=1.0)
    products: Tensor = picked / tokens * probabilities / tokens
    return products.sum() * use.shape[-1]


@torch.no_grad()
def router_loss_of(causal: PreTrainedModel, coefficient: float | None) -> tuple[RouterLoss | None, str]:
    """The router loss that a model is trained with, and a notice (or "").

    Args:
        causal: the causal language model itself.
        coefficient: the loss's weight; None: the one that the model's configuration declares.

    Returns:
        None without routers, with a weight of 0, or where the model has no such loss and none was asked for.

    Raises:
        ValueError: a weight is given for a model without this loss, or the model's own loss is another one.
    """
    config = causal.config.get_text_config()
    declared = getattr(config, "router_aux_loss_coef", None) if hasattr(config, "output_router_logits") else None
    weight = (declared or 0.0) if coefficient is None else coefficient
    if not weight:
        return None, ""
    expected = _own_loss(causal) if hasattr(config, "output_router_logits") else None
    if expected is None:
        if coefficient is None:
            return None, (
                f"{type(causal).__name__} of transformers {transformers.__version__} has no router loss, although its "
                "config.json declares a weight for one"
            )
        raise ValueError(
            f"router_aux_loss_coef is {coefficient:g}, and {type(causal).__name__} (model_type {config.model_type}) of "
            f"transformers {transformers.__version__} has no router loss: only mixture-of-experts models whose routers are "
            "balanced by one have it; leave it out"
        )
    number = getattr(causal, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if isinstance(number, int):
        tokens = _tokens(causal)
        logits = causal.base_model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
        use = expert_use(logits, [tokens.shape[1]], experts_per_token=number)
        if abs(float(load_balancing_loss(use, experts_per_token=number)) - expected) <= _SAME * max(1.0, expected):
            return RouterLoss(weight, number), ""
    raise ValueError(
        f"{type(causal).__name__} has a router loss that ncalign does not know: set router_aux_loss_coef: 0 to train without "
        "it, and please report the architecture"
    )


def _own_loss(causal: PreTrainedModel) -> float | None:
    """The router loss by the model itself on a few tokens; None where it computes none.

    That is also so where transformers does not record the routers' logits, as of Granite before 5.18: the loss is then 0.
    """
    found = torch.nn.Module.__call__(causal, input_ids=_tokens(causal), use_cache=False, output_router_logits=True)
    loss = getattr(found, "aux_loss", None)
    return None if loss is None or getattr(found, "router_logits", None) is None else float(loss)


def _tokens(causal: PreTrainedModel) -> Tensor:
    vocabulary = int(causal.config.get_text_config().vocab_size)
    return (torch.arange(1, 33, device=causal.device) * 7919 % vocabulary).unsqueeze(0)

"""Log-probs of tokens through Liger's kernel for Hopper GPUs, which holds no logits in its forward pass, and when it applies.

Source: ``LigerFusedLinearScaledCrossEntropyFunction`` of liger-kernel 0.8.5. It gives a loss and takes a gradient for each
token, so that each weighs as its candidate does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ncalign.core.install import install_hint

_HOPPER = (9, 0)


class Formula(NamedTuple):
    """Logits of a linear head's outputs ``z``: ``scale z``, or with a soft cap ``cap tanh(scale z / cap)``."""

    scale: float
    cap: float | None


def formula_of(model: PreTrainedModel) -> Formula:
    """The scaling and soft-capping that the model's configuration declares."""
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Formula(factor / divisor, getattr(config, "final_logit_softcapping", None))


def why_not_fused(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Tell what keeps Liger's kernel from computing this model's head; None where nothing does.

    Args:
        model: a causal language model.
        device: on which it trains.
        dtype: in which the head's products are computed.
    """
    head: Any = model.get_output_embeddings()
    formula = formula_of(model)
    amd = torch.version.hip is not None
    if device.type != "cuda" or amd:
        return f"it runs on NVIDIA's GPUs, and this is {'a GPU of AMD' if amd else device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != _HOPPER:
        return f"it is made for compute capability 9.0 (H100, H200), and this GPU has {'.'.join(map(str, capability))}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, and this run in {str(dtype).removeprefix('torch.')}"
    # An adapter on the head, a quantized one or one that is watched computes more than the product with its weight.
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return f"it takes a plain linear layer, and the head of this model is a {type(head).__name__}, adapted or extended"
    if dict(head.named_parameters(recurse=False)).keys() != {"weight"}:
        return "it has no bias, and the head of this model has one"
    if formula.cap is not None:
        return f"it has no soft cap, and the logits of this model have one (final_logit_softcapping: {formula.cap:g})"
    if formula.scale <= 0:
        return f"it needs a positive scale of logits, and this model's is {formula.scale:g}"
    try:
        _kernel()
    except ImportError as error:
        return f"the package liger-kernel (0.8.5 or later) with nvidia-cutlass-dsl is needed ({error}): {install_hint('gpu')}"
    return None


def fused_token_logprobs(
    weight: Float[Tensor, "V D"], hidden: Float[Tensor, "C D"], targets: Int[Tensor, " C"], *, scale: float
) -> Float[Tensor, " C"]:
    """``log softmax(scale W h_t)[y_t]`` of each token, in nats and float32.

    Args:
        weight: of the head; frozen, or in another precision, whose gradients it has then.
        hidden: last hidden states, likewise.
        targets: the tokens ``y_t``.
        scale: of logits; positive.
    """
    # Autocast would round what the function itself computes outside its kernel, such as the normaliser.
    with torch.autocast(hidden.device.type, enabled=False):
        losses: Tensor = _kernel().apply(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), targets, 1.0 / scale)
    return -losses


def precision_of(hidden: Tensor) -> torch.dtype:
    """In which a linear layer computes with these inputs: autocast's, or their own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _kernel() -> Any:
    """Liger's function.

    Raises:
        ImportError: a package is missing, or too old.
    """
    # Each call would have the host wait for a look at the targets, which are tokens of the vocabulary in any case.
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    if find_spec("cutlass") is None:
        raise ImportError("No module named 'cutlass'")
    return LigerFusedLinearScaledCrossEntropyFunction

"""Weights in 4 bits, by bitsandbytes: what can be held so, how it is loaded, counted and turned back into whole numbers.

bitsandbytes and what transformers builds on it are imported where they are used: ncalign works without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ncalign.core.install import install_hint
from ncalign.model.config import Quantization
from ncalign.model.precision import announce

RECORD = "quantization.json"
"""Beside an adapter: how its base model's weights were held while it was trained."""

_PREFIX = "base_model.model."
"""Of peft's, in front of the base model's names."""
_BLOCK, _SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of theirs."""
_DEQUANTIZED_IN_LOADING = frozenset({"mxfp4"})
"""Ways to store weights that transformers undoes itself where the machine has no kernels for them."""


def four_bits(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to know to hold a model's linear layers in 4 bits.

    Args:
        quantization: as configured.
        dtype: of the computation, in which each layer's weights are put together again, and of the tensors that the bits are
            packed in: FSDP2 shards floats only, and those of the other weights' precision in one group with them.

    Raises:
        ValueError: bitsandbytes is not installed, or does not work here.
    """
    try:
        import bitsandbytes  # noqa: F401
    # Its own libraries are loaded by its import, and may not fit the machine.
    except (ImportError, OSError, RuntimeError) as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" that works here ({error})"
        raise ValueError(f"quantization needs the package bitsandbytes{why}: {install_hint('qlora')}") from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def refuse_stored_quantized(config: PreTrainedConfig, model: str, *, what: str) -> None:
    """Refuse a model whose weights are stored quantized.

    Raises:
        ValueError: they are, in a way that loading does not undo.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    method = str(getattr(method, "value", method) or "unnamed")
    if method not in _DEQUANTIZED_IN_LOADING:
        raise ValueError(
            f"{what} {model!r} is stored with quantized weights (quantization_config of its config.json: {method}), which can "
            "be neither trained nor merged with an adapter: give the model that it was made from, and to train an adapter on "
            "4-bit weights add quantization: true"
        )


def refuse_unquantizable(shapes: PreTrainedModel, model: str) -> None:
    """Refuse a model whose weights bitsandbytes would leave as they are.

    Args:
        shapes: the model, its weights without values.
        model: its name, for messages.

    Raises:
        ValueError: experts are parameters of three dimensions, or there is no linear layer.
    """
    experts = {
        f"{name}.{own}": parameter
        for name, module in shapes.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    }
    if experts:
        share = sum(map(Tensor.numel, experts.values())) / sum(map(Tensor.numel, shapes.parameters()))
        first = next(iter(experts))
        raise ValueError(
            f"quantization can't be had for {model!r}: bitsandbytes holds linear layers in 4 bits, and {share:.0%} of this "
            f"model's weights are experts, which are parameters of three dimensions ({first}: "
            f"{'x'.join(map(str, experts[first].shape))}) and would stay as they are; leave quantization out: lora with dtype: "
            "bfloat16 holds the frozen weights in two bytes each"
        )
    from transformers.pytorch_utils import Conv1D

    if not any(type(module) is nn.Linear or isinstance(module, Conv1D) for module in shapes.modules()):
        raise ValueError(f"quantization can't be had for {model!r}: it has no linear layer that bitsandbytes knows")


def shapes_of(config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The causal language model of a configuration, its weights without values or memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    return model


def hold_in_one_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for inference on processors with bf16 instructions.

    The repacked layer computes in bfloat16 whatever was asked for, so that reference and policy would differ, and passes no
    gradient on when it is trained next.
    """
    for module in _four_bit_layers(model).values():
        module.support_avx512bf16_for_cpu = False


def _four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are in 4 bits, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "quant_state", None) is not None}


def num_frozen(model: nn.Module) -> int:
    """Number of frozen weights, however many of them a number of a tensor packs."""
    frozen = {name: parameter.numel() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    frozen |= {f"{name}.weight": layer.quant_state.shape.numel() for name, layer in _four_bit_layers(model).items()}
    return sum(frozen.values())


def num_weights(weight: Tensor) -> int:
    """Number of weights that a parameter holds, packed or not."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(state.shape.numel())


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, and of the scales of those in 4 bits."""
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for layer in _four_bit_layers(model).values():
        state = layer.quant_state
        scales = [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]
        held += sum(scale.numel() * scale.element_size() for scale in scales)
    return held


def estimated_bytes(shapes: PreTrainedModel, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Bytes that a model's weights will take, from their shapes alone."""
    total = sum(parameter.numel() for parameter in shapes.parameters()) * dtype.itemsize
    if quantization is None:
        return total
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    quantizer = AutoHfQuantizer.from_config(four_bits(quantization, dtype))
    kept = quantizer.get_modules_to_not_convert(shapes, None, shapes._keep_in_fp32_modules)
    for name, module in shapes.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            number = module.weight.numel()
            scales = math.ceil(number / _BLOCK)
            # Two weights a byte; a scale is a float32, or a byte with a float32 for each block of scales.
            held = scales + 4 * math.ceil(scales / _SCALES_BLOCK) if quantization.double else 4 * scales
            total += math.ceil(number / 2) + held - number * dtype.itemsize
    return total


@torch.no_grad()
def dequantized(model: PeftModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model without its adapter and with ordinary float32 weights: those in 4 bits as the computation puts them together.

    Args:
        model: the policy; it stays as it is.
        state: its tensors by their names in it, gathered from all processes.
    """
    import bitsandbytes
    from transformers.pytorch_utils import Conv1D

    held = model.get_base_model()
    assert isinstance(held, PreTrainedModel)
    layers, values = _four_bit_layers(held), {}
    for name, _ in held.named_parameters():
        place, _, own = name.rpartition(".")
        layer, weight = layers.get(place), state[f"{_PREFIX}{name}"].detach()
        if layer is not None and own == "weight":
            weight = bitsandbytes.functional.dequantize_4bit(weight.to(layer.quant_state.absmax.device), layer.quant_state)
            weight = weight.T if issubclass(layer.source_cls, Conv1D) else weight
        values[f"{place.removesuffix('.base_layer')}.{own}"] = weight.cpu().float().contiguous()
    described = {name: value for name, value in held.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        whole = type(held)(type(held.config).from_dict(described))
    whole.load_state_dict(values, strict=False, assign=True)
    whole.tie_weights()
    left = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    assert not left, f"weights without values: {left[:3]}"
    whole.generation_config = held.generation_config
    return whole


def write_record(quantization: Quantization, dtype: torch.dtype, folder: Path) -> None:
    """Write beside an adapter how its base model was held in training."""
    record = quantization.model_dump() | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def tell_of_whole_base(folder: str) -> None:
    """Say of an adapter that was trained on weights in 4 bits that it is put on whole ones here."""
    try:
        record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(record, dict) and record.get("type") in get_args(Quantization.model_fields["type"].annotation):
        announce(
            f"note: the adapter in {folder} was trained on its base model in {record.get('bits')} bits ({record['type']}), and "
            "is put on the base model's own weights here: log-probs differ slightly from those of training; train's merge "
            "saves the model that was trained"
        )

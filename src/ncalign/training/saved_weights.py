"""A model's weights one after the other, as a saved Hugging Face folder has them, for whoever would load such a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ncalign.training.export import PREFIX, aliases


class Description(NamedTuple):
    """A weight's name, precision and whole shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class SavedWeights:
    """The names, shapes and values that `save_pretrained` would write, a layer in memory at a time.

    Tied weights are there once. What transformers holds in another form than files do, such as a layer's experts in one tensor,
    is put back. Each pass gives the weights of that moment, in the precision that they are held in.

    Args:
        held: the policy without adapters.
        model: the same, as accelerate prepared it.
        device: where the weights are gathered.

    Raises:
        ValueError: a layer can't be put back into the form of files by itself.
    """

    def __init__(self, held: PreTrainedModel, model: nn.Module, device: torch.device) -> None:
        self._held, self._model, self._device = held, model, device
        self._left_out = {*aliases(held), *(held._keys_to_ignore_on_save or ())}
        state = {name: _described(tensor) for name, tensor in self._state().items()}
        self._layers = layers_of(list(state))
        self.described = [
            Description(name, tensor.dtype, tuple(tensor.shape))
            for layer in self._layers
            for name, tensor in self._as_saved({name: state[name] for name in layer}).items()
        ]
        at_once = {Description(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._as_saved(dict(state)).items()}
        if set(self.described) != at_once or len(self.described) != len(at_once):
            raise ValueError(
                f"the weights of {type(held).__name__} take other names in files, and not layer by layer: they can't "
                "be sent one after the other"
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole weight, in the order of ``described``; where weights are sharded, all processes iterate together."""
        state = self._state()
        for layer in self._layers:
            with torch.no_grad():
                whole = {name: self._gathered(state[name]) for name in layer}
                saved = self._as_saved(whole)
            yield from saved.items()

    def _state(self) -> dict[str, Tensor]:
        """What this process holds: sharded weights are not gathered, also where the last pass left some so."""
        state = get_model_state_dict(self._model, options=StateDictOptions())
        named: dict[str, Any] = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
        return {name: tensor for name, tensor in named.items() if name not in self._left_out}

    def _gathered(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(self._device)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _as_saved(self, weights: dict[str, Tensor]) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(self._held, weights)
        return found


def _described(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def layers_of(names: list[str]) -> list[list[str]]:
    """Names of weights, those of a layer together, in the order of their first.

    A layer is what the first number in a name counts; others are by themselves.

    >>> layers_of(["embed.weight", "layers.0.a", "layers.0.experts.1.b", "layers.1.a", "norm.weight"])
    [['embed.weight'], ['layers.0.a', 'layers.0.experts.1.b'], ['layers.1.a'], ['norm.weight']]
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        layer = name if number is None else ".".join(parts[: number + 1])
        found.setdefault(layer, []).append(name)
    return list(found.values())

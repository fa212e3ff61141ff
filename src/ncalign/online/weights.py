"""The weights that reference log-probs are computed with: the starting ones, the round's, or a moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from ncalign.model.logprobs import LogprobModel
from ncalign.model.policy import reference_mode
from ncalign.training.shards import own_part, reshard

Kind = Literal["fixed", "last_round", "ema"]


class ReferenceWeights:
    """Puts the reference policy's weights in place for a while.

    The fixed reference of an adapter is the model with its adapter off and costs nothing; of all weights a copy is kept, as
    of a moving average; where weights are sharded, each process keeps its parts.

    Args:
        model: the policy, at its start.
        kind: which weights are the reference's.
        decay: of the moving average.
    """

    def __init__(self, model: LogprobModel, *, kind: Kind, decay: float) -> None:
        self._model, self.kind, self._decay = model, kind, decay
        self._off = kind == "fixed" and isinstance(model.model, PeftModel)
        self._kept: dict[str, Tensor] = {}
        if not self._off and kind != "last_round":
            self._kept = {name: parameter.detach().clone() for name, parameter in self._trained()}

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        reshard(self._model)
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the policy."""
        if self.kind == "ema":
            for name, parameter in self._trained():
                own_part(self._kept[name]).lerp_(own_part(parameter.detach()), 1 - self._decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the policy has the reference's weights."""
        if self._off:
            with reference_mode(self._model.model):
                yield
            return
        with torch.no_grad():
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    def _exchange(self) -> None:
        """Swap what the parameters hold with what is kept: no third copy, and bitwise back again."""
        for name, parameter in self._trained():
            if name not in self._kept:
                continue
            if isinstance(parameter, DTensor):
                # What is gathered is this very memory: its contents change places, a parameter's at a time.
                own, kept = own_part(parameter.detach()), own_part(self._kept[name])
                before = own.clone()
                own.copy_(kept)
                kept.copy_(before)
            else:
                parameter.data, self._kept[name] = self._kept[name], parameter.data
        reshard(self._model)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint saves and fills: the moving average. Other references come from the starting model."""
        return {f"reference.{name}": tensor for name, tensor in self._kept.items()} if self.kind == "ema" else {}

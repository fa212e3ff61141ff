"""Memory that live tensors hold, operation by operation: weights, gathered weights, casts, gradients and moments alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside, the bytes of all tensors that were there or that operations make; FSDP2 empties storages in place."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        self.peak = 0
        for found in gc.get_objects():
            # By its type: some of the objects warn, or import a module, when they are asked for their class.
            if issubclass(type(found), torch.Tensor):
                self._add(found)

    @property
    def now(self) -> int:
        """Bytes held at this moment."""
        return sum(storage.nbytes() for storage in list(self._storages.values()))

    def _add(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory was not known."""
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        known = storage._cdata in self._storages
        self._storages[storage._cdata] = storage
        return not known

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it made."""
        found = function(*args, **(kwargs or {}))
        if any([self._add(leaf) for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]):
            self.peak = max(self.peak, self.now)
        return found

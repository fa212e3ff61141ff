"""A stand-in for the trainer's side of vLLM's weight transfer where there is no GPU.

It follows vLLM 0.32's `vllm.distributed.weight_transfer.nccl_engine` step by step, with a store over TCP in place of NCCL: who
does not come is waited for, and so is who does not receive.
"""

from __future__ import annotations

import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from ncalign.online import transfer

PATIENCE = timedelta(seconds=60)


class Group:
    """A communicator: all ranks meet in it, and the first one's tensors reach the others."""

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        self._store = TCPStore(address, port, world_size, rank == 0, PATIENCE, wait_for_workers=True)
        self._others, self._number = world_size - 1, 0

    def send(self, tensor: Tensor) -> None:
        data = io.BytesIO()
        torch.save(tensor.cpu(), data)
        self._store.set(str(self._number), data.getvalue())
        self._number += 1

    def drain(self) -> None:
        """Wait until all have received all."""
        for rank in range(self._others):
            self._store.wait([f"received {self._number} {rank}"])

    def receive(self) -> Tensor:
        data = self._store.get(str(self._number))
        self._number += 1
        found: Tensor = torch.load(io.BytesIO(data), weights_only=True)
        return found

    def received(self) -> None:
        rank = self._store.add(f"received {self._number}", 1) - 1
        self._store.set(f"received {self._number} {rank}", "")


@dataclass(frozen=True)
class ParamMeta:
    """As vLLM's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(ABC):
    """As vLLM's."""

    @abstractmethod
    def metadata(self) -> list[ParamMeta]: ...

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass
class NCCLTrainerInitInfo:
    """As vLLM's."""

    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    rank: int = field(kw_only=True)


class NCCLTrainerWeightTransferEngine:
    """As vLLM's, with a :class:`Group` for its communicator."""

    def __init__(self, client: Any, source: WeightSource, is_sender: bool) -> None:
        self.client, self.source, self.is_sender = client, source, is_sender
        self.group: Group | None = None

    @classmethod
    def trainer_init(
        cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: WeightSource
    ) -> NCCLTrainerWeightTransferEngine:
        engine = cls(client, source, init_info.rank == 0)
        if not engine.is_sender:
            return engine
        given = {**asdict(init_info), "rank_offset": 1}
        del given["rank"]
        with ThreadPoolExecutor(max_workers=1) as exe:
            future = exe.submit(client.init_weight_transfer_engine, given)
            engine.group = Group(init_info.master_address, init_info.master_port, 0, init_info.world_size)
            future.result()
        return engine

    def send_weights(self) -> None:
        meta = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        info = {"names": [one.name for one in meta], "dtype_names": [str(one.dtype).split(".")[-1] for one in meta]}
        self.client.start_weight_update()
        exe = ThreadPoolExecutor(max_workers=1)
        try:
            future = exe.submit(self.client.update_weights, {**info, "shapes": [list(one.shape) for one in meta]})
            assert self.group is not None
            for expected, (name, tensor) in zip(meta, self.source, strict=True):
                assert (name, tensor.dtype, tuple(tensor.shape)) == (expected.name, expected.dtype, expected.shape)
                self.group.send(tensor)
            self.group.drain()
            future.result()
        finally:
            exe.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.group = None


def put_in_place() -> None:
    """Have ncalign find this in vLLM's place, and send from a CPU."""
    found = ModuleType(transfer._ENGINE)
    for one in (ParamMeta, WeightSource, NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine):
        setattr(found, one.__name__, one)
    sys.modules[transfer._ENGINE] = found
    transfer._DEVICE = "cpu"

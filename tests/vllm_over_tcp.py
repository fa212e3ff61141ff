"""vLLM's weight transfer over TCP in place of NCCL, which needs GPUs: all else is vLLM's own, servers and trainer's side.

In vLLM's environment: a plugin (``register``) for servers, and a program that runs `ncalign online`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

PATIENCE = timedelta(seconds=120)


class Communicator:
    """What vLLM's engines use of `PyNcclCommunicator`."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, device: Any = None) -> None:
        self._store = TCPStore(host, port, world_size, rank == 0, PATIENCE, wait_for_workers=True)
        self._rank, self._others, self._number = rank, range(1, world_size), 0

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        number, self._number = self._number, self._number + 1
        if self._rank == src:
            data = io.BytesIO()
            torch.save(tensor, data)
            self._store.set(f"sent {number}", data.getvalue())
            self._store.wait([f"taken {number} {rank}" for rank in self._others])
        else:
            tensor.copy_(torch.load(io.BytesIO(self._store.get(f"sent {number}")), weights_only=True))
            self._store.set(f"taken {number} {self._rank}", "")

    def destroy(self) -> None:
        del self._store


class Stream:
    """A stream on a CPU."""

    def synchronize(self) -> None:
        pass


def register() -> None:
    """Put it in place of what needs a GPU."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    nccl_common.stateless_init_process_group = Communicator
    packed_tensor._get_streams = lambda index, number: (Stream(),) * number
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda: None  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]


if __name__ == "__main__":
    from ncalign.cli.app import main
    from ncalign.online import transfer

    register()
    transfer._DEVICE = "cpu"
    sys.exit(main(sys.argv[1:]))

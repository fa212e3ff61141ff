"""All of the policy's weights to vLLM's servers, from GPU to GPU over NCCL, by vLLM's own weight transfer (vLLM 0.32).

For each round a group of its own is made of the first process and all workers of all servers that answer: a server that died is
left out, and one that was started anew is taken in. NCCL waits without end for who is gone, so that what waits runs in a thread
that is given up where a server refuses or time is up.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from torch import Tensor

from ncalign.core.install import install_hint
from ncalign.generation.client import Server, cancel_requests
from ncalign.generation.failures import ServerError
from ncalign.generation.hosts import Order
from ncalign.model.policy import Policy
from ncalign.training.engine import Engine
from ncalign.training.peers import decided_by_first
from ncalign.training.saved_weights import SavedWeights

ADDRESS = "VLLM_HOST_IP"
"""vLLM's own variable for the address of a machine, where it is not the one that leads to the servers."""

# NCCL's.
_DEVICE = "cuda"
_ENGINE = "vllm.distributed.weight_transfer.nccl_engine"
_START = "start vLLM 0.32 or later with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config.backend nccl"
_Outcome = tuple[Any, BaseException | None]


class Transfer:
    """Sends weights to the servers of one model; all processes make one, and call it together.

    Args:
        policy: without adapters.
        engine: that trains it.
        accelerator: this process's.
        server: of which the weights are.
        seconds: how long the servers may take to receive them.

    Raises:
        ValueError: the package vllm is missing, this process has no CUDA device, or the weights can't be sent one by one.
    """

    def __init__(self, policy: Policy, engine: Engine, accelerator: Accelerator, server: Server, *, seconds: float) -> None:
        if accelerator.device.type != _DEVICE:
            raise ValueError(
                f"push: nccl sends weights from GPU to GPU, and this process trains on {accelerator.device.type}: set push: "
                "folder"
            )
        try:
            self._vllm = importlib.import_module(_ENGINE)
        except ImportError as error:
            raise ValueError(
                "push: nccl needs the package vllm, 0.32 or later, in the environment that trains, since vLLM's own code sends "
                f"the weights: {install_hint('vllm')}, or set push: folder ({error})"
            ) from None
        try:
            weights = SavedWeights(policy.model, engine.model, accelerator.device)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"push: nccl: {error}: set push: folder") from None
        self._source = _source(self._vllm, weights)
        self._accelerator, self._server, self._seconds = accelerator, server, seconds

    def send(self, version: str) -> None:
        """Give every server that answers the weights as they are now, under this version's name.

        Raises:
            ValueError: a server refuses them or does not take them in time, or none answers; where they were under way, servers
                must be started anew.
        """
        # No server has these words from another run of the same name.
        named = decided_by_first(self._accelerator, lambda: f"{version}-{uuid.uuid4().hex[:8]}")
        self._server.weights = named
        opened: list[Any] = []
        # The others only join in gathering sharded weights.
        decided_by_first(self._accelerator, lambda: opened.append(self._opened(named)))
        if not self._accelerator.is_main_process:
            self._engine(rank=self._accelerator.process_index).send_weights()
        else:
            client, engine = opened[0]
            broken = "the weights were under way: start the servers anew, and give the same command again"
            self._waited(engine.send_weights, client, broken)
        decided_by_first(self._accelerator, lambda: self._closed(*opened[0]))

    def _engine(self, *, rank: int, client: Any = None, address: str = "", port: int = 0, world_size: int = 1) -> Any:
        """An engine of vLLM's for this process; the first one's meets the servers' workers."""
        info = self._vllm.NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=rank)
        return self._vllm.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=self._source)

    def _opened(self, version: str) -> tuple[_Servers, Any]:
        """Whom the weights go to, and an engine that has met all of them."""
        try:
            sizes = {url: _world_size(url, said) for url, said in self._server.ask_all(Order("//get_world_size", None)).items()}
        except ServerError as error:
            raise ValueError(f"{error}: {_START}") from None
        client = _Servers(self._server, sizes, version)
        address = _address_towards(list(sizes))
        port = _free_port(address)
        size = 1 + sum(sizes.values())
        meet = partial(self._engine, rank=0, client=client, address=address, port=port, world_size=size)
        return client, self._waited(
            meet, client, f"{_START}, all reaching {address}:{port}, this machine's ({ADDRESS} names another)"
        )

    def _closed(self, client: _Servers, engine: Any) -> None:
        """Let go of the group, and have the servers answer again, from the new weights."""
        engine.shutdown()
        try:
            client.go_on()
        except ServerError as error:
            raise ValueError(str(error)) from None

    def _waited(self, work: Callable[[], Any], client: _Servers, remedy: str) -> Any:
        """What NCCL work gives, unless a server refuses its part first, or time is up."""
        outcomes: queue.Queue[_Outcome] = queue.Queue()
        client.failed = lambda error: outcomes.put((None, error))

        def run() -> None:
            try:
                if self._accelerator.device.type == "cuda":
                    torch.cuda.set_device(self._accelerator.device)
                outcomes.put((work(), None))
            except Exception as error:
                outcomes.put((None, error))

        threading.Thread(target=run, name="weight transfer", daemon=True).start()
        try:
            found, error = outcomes.get(timeout=self._seconds)
        except queue.Empty:
            error = TimeoutError(f"the servers have not taken the weights within ddp_timeout ({self._seconds:g} s)")
        except BaseException:
            cancel_requests()
            raise
        if error is None:
            return found
        # Python waits for vLLM's own thread before it ends, and that one for a server.
        cancel_requests()
        raise ValueError(f"push: nccl: {error}: {remedy}") from error


class _Servers:
    """Several servers as one, for vLLM's engine (its `VLLMWeightSyncClient`): each has a part of the group's ranks.

    Args:
        server: the client of all of them.
        sizes: number of workers of each that takes part, by its URL.
        version: of the weights that they will get.
    """

    def __init__(self, server: Server, sizes: Mapping[str, int], version: str) -> None:
        self._server, self._sizes, self._version = server, dict(sizes), version
        self.failed: Callable[[ServerError], None] = lambda error: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first, bodies = init_info["rank_offset"], {}
        for url, size in self._sizes.items():
            bodies[url] = {"init_info": {**init_info, "rank_offset": first}}
            first += size
        self._tell("//init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        # While weights come in there is no model to answer from.
        self._tell("//pause?mode=wait")
        self._tell("//start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._tell("//update_weights", {url: {"update_info": update_info} for url in self._sizes})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or self._version
        self._tell("//finish_weight_update", {url: {"weight_version": version} for url in self._sizes})

    def go_on(self) -> None:
        """Leave the group, forget what was computed with other weights, and answer again."""
        for path in ("//shutdown_weight_transfer_engine", "//reset_prefix_cache", "//resume"):
            self._tell(path)

    def _tell(self, path: str, bodies: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        orders = {url: Order(path, {} if bodies is None else bodies[url]) for url in self._sizes}
        found = self._server.at_once(orders, failed=self.failed)
        for answer in found.values():
            if isinstance(answer, ServerError):
                raise answer


def _source(vllm: Any, weights: SavedWeights) -> Any:
    """The weights as vLLM's engine reads them."""

    class Source(vllm.WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [vllm.ParamMeta(*one) for one in weights.described]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights)

    return Source()


def _world_size(url: str, said: str) -> int:
    """The number of a server's workers, as it says."""
    try:
        found = json.loads(said)["world_size"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"server {url} does not say how many workers it has (/get_world_size): {_START}")
    return found


def _address_towards(urls: Sequence[str]) -> str:
    """This machine's IPv4 address by which the servers reach it: the one that leads to them, or what ``VLLM_HOST_IP`` says.

    Raises:
        ValueError: no address leads to a server.
    """
    if given := os.environ.get(ADDRESS):
        return given
    found = []
    for url in urls:
        parts = urlsplit(url)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                # Nothing is sent.
                one.connect((parts.hostname, parts.port or 80))
                found.append(str(one.getsockname()[0]))
        except OSError as error:
            raise ValueError(
                f"push: nccl: no IPv4 address of this machine leads to {url} ({error}): name one in {ADDRESS}"
            ) from None
    # From elsewhere this machine is not reached by the address that it has for itself.
    return next((address for address in found if not address.startswith("127.")), found[0])


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        try:
            one.bind((address, 0))
        except OSError as error:
            raise ValueError(f"push: nccl: {address} is no address of this machine ({error}): name one in {ADDRESS}") from None
        return int(one.getsockname()[1])

"""Generators of a round's completions, and how they get the policy's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from ncalign.core.atomic import delete_folder
from ncalign.core.store import Store
from ncalign.generation.base import Generator
from ncalign.generation.client import Server
from ncalign.generation.hosts import Order
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.token_prompts import TokenPrompts
from ncalign.generation.vllm import VLLMGenerator
from ncalign.model.encoding import conversation_rules
from ncalign.model.limits import limits_of
from ncalign.model.policy import Policy
from ncalign.online.config import OnlineConfig
from ncalign.online.transfer import Transfer
from ncalign.training.engine import Engine
from ncalign.training.export import save_model
from ncalign.training.run_folder import ROUNDS
from ncalign.training.samples import policy_generator
from ncalign.training.shards import Gathering

_WEIGHTS, _START = "weights", "start"


class GeneratorOf(Protocol):
    """A generator that follows the policy."""

    def update(self, folder: Path) -> None:
        """Give the generator the policy's current weights; ``folder`` is where they may be written."""
        ...

    def sampling(self) -> AbstractContextManager[Generator]:
        """A context with the generator as last updated; all processes enter it together, and wait for nobody inside."""
        ...

    def each(self) -> Mapping[str, Generator]:
        """What this process is to probe, by names that no other process gives: all that may hold weights of their own."""
        ...


class InProcess:
    """The policy itself samples: there is nothing to hand over; where it is sharded, it is gathered for the time."""

    def __init__(self, config: OnlineConfig, policy: Policy, engine: Engine) -> None:
        self._model, self._accelerator = policy.model, engine.accelerator
        self._gathering = Gathering(engine.inner, engine.accelerator)
        self._generator = policy_generator(config.training, policy, engine.accelerator, batch_size=config.generation_batch_size)

    def update(self, folder: Path) -> None:
        """Nothing to do."""

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Generator]:
        """The policy, in evaluation mode."""
        self._model.eval()
        with self._gathering.whole():
            yield self._generator

    def each(self) -> dict[str, Generator]:
        """The policy in this process."""
        number = self._accelerator.process_index
        return {"generator" if self._accelerator.num_processes == 1 else f"generator of process {number}": self._generator}


class Pushed:
    """A generator outside this process, which is given the policy's weights; the first process hands them over."""

    def __init__(
        self,
        config: OnlineConfig,
        policy: Policy,
        engine: Engine,
        accelerator: Accelerator,
        generator: ServerGenerator | VLLMGenerator,
    ) -> None:
        self._config, self._policy, self._engine, self._accelerator = config, policy, engine, accelerator
        self._generator = generator
        self._transfer: Transfer | None = None
        if config.push == "nccl":
            assert isinstance(generator, ServerGenerator)
            self._transfer = Transfer(policy, engine, accelerator, generator.server, seconds=config.training.ddp_timeout)

    def update(self, folder: Path) -> None:
        """Send the weights, or write them and have the generator load them."""
        version = f"{self._config.training.output_dir.name}-{folder.name}"
        generator, adapter = self._generator, self._config.push == "lora"
        if isinstance(generator, ServerGenerator):
            generator.server.version = version
        if self._transfer is not None:
            self._transfer.send(version)
        if self._config.push in ("none", "nccl"):
            return
        target = (folder / _WEIGHTS).resolve()
        # An adapter goes as one, and a folder holds whole weights, whatever the run's model is to become at its end.
        merge = not adapter and self._config.training.lora is not None
        save_model(self._policy, self._engine.model, self._accelerator, merge=merge, card=None, target=target)
        if isinstance(generator, VLLMGenerator):
            (generator.load_adapter if adapter else generator.load_weights)(target)
        elif adapter:
            load_adapter_on(generator.server, version, target, told=not self._accelerator.is_main_process)
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
            orders = [Order("//collective_rpc", reload), Order("//reset_prefix_cache", {})]
            generator.server.order(orders, told=not self._accelerator.is_main_process)
        # Of this process or of one that was killed.
        rounds = self._config.training.output_dir / ROUNDS
        for earlier in (*rounds.glob(f"*/{_WEIGHTS}"), *rounds.glob(_WEIGHTS)) if self._accelerator.is_main_process else ():
            if earlier.resolve() != target:
                delete_folder(earlier)
        self._accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Generator]:
        """The generator."""
        yield self._generator

    def each(self) -> dict[str, Generator]:
        """The servers, or vLLM in this process, of which the first process probes each."""
        if not self._accelerator.is_main_process:
            return {}
        if isinstance(self._generator, VLLMGenerator):
            return {"generator": self._generator}
        return {f"server {url}": alone for url, alone in self._generator.each().items()}


def load_adapter_on(server: Server, name: str, folder: Path, *, told: bool = False) -> None:
    """Have vLLM's servers load an adapter under a new name, and ask for that from now on.

    They must have been started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``, and see the folder.
    ``told``: another process does so.
    """
    stale = sorted({server.model, name} - {server.config.model})
    unload = [Order("/unload_lora_adapter", {"lora_name": one}, needed=False) for one in stale]
    server.order([*unload, Order("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})], told=told)
    server.model = name


def make_generator(config: OnlineConfig, policy: Policy, engine: Engine, accelerator: Accelerator) -> GeneratorOf:
    """The generator that the configuration names."""
    if config.generator == "transformers":
        return InProcess(config, policy, engine)
    encoding, limits = config.training.encoding, limits_of(policy.model)
    rules = conversation_rules(encoding)
    room = encoding.max_length + config.max_new_tokens
    max_tokens = room if limits.context is None else min(room, limits.context)
    tokens = TokenPrompts(
        policy.tokenizer,
        string_prompts=encoding.string_prompts,
        control_tokens=encoding.control_tokens_in_text,
        template=rules.template(policy.tokenizer, encoding.template_date),
        max_tokens=max_tokens if config.generator == "vllm" else None,
        vocabulary=limits.vocabulary,
    )
    remote: ServerGenerator | VLLMGenerator
    if config.server is not None:
        # A file for each process: databases that machines share over a network are not to be trusted.
        own = "" if accelerator.is_main_process else f"-{accelerator.process_index}"
        share = max(1, config.server.max_concurrency // accelerator.num_processes)
        remote = ServerGenerator(
            config.server.model_copy(update={"max_concurrency": share}),
            store=Store(config.training.output_dir / ROUNDS / f"answers{own}.sqlite"),
            string_prompts=encoding.string_prompts,
            tokens=tokens if _sends_token_ids(config) else None,
            progress=False,
            template_kwargs=rules.template_kwargs,
            strip_thoughts=rules.thoughts == "stripped",
        )
    elif accelerator.num_processes > 1:
        raise ValueError(
            f"generator: vllm runs in a training process, of which {accelerator.num_processes} were launched: train in one, or "
            "start vLLM's servers and give generator: server"
        )
    else:
        start = config.training.model
        if policy.on_adapter:
            # vLLM takes one adapter at a time, and that will be the one in training.
            target = (config.training.output_dir / ROUNDS / _START).resolve()
            save_model(policy, engine.model, accelerator, merge=config.training.lora is not None, card=None, target=target)
            start = str(target)
        remote = VLLMGenerator(
            start,
            tokens,
            adapter_rank=config.training.lora.r if config.training.lora is not None and config.push == "lora" else None,
            max_tokens=max_tokens,
            options={
                "gpu_memory_utilization": config.vllm_memory,
                "seed": config.training.seed,
                # Left to itself it computes float32 weights in bfloat16.
                "dtype": "bfloat16" if config.training.dtype == "bfloat16" else "float32",
            },
        )
    return Pushed(config, policy, engine, accelerator, remote)


def _sends_token_ids(config: OnlineConfig) -> bool:
    """Whether prompts reach the server as token ids: only vLLM takes weights, and it takes those too.

    Raises:
        ValueError: the server makes tokens itself, and is not to make control tokens of what is written out.
    """
    sends = config.push != "none" if config.server_prompts == "auto" else config.server_prompts == "token_ids"
    if not sends and config.training.encoding.control_tokens_in_text == "escape":
        raise ValueError(
            "control_tokens_in_text: escape can't be had from a server that makes tokens of prompts itself: set "
            "server_prompts: token_ids, for vLLM"
        )
    return sends

"""A trained model behind one of lm-eval's backends, and such a backend as a generator of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ncalign.core.deadline import within
from ncalign.core.hub import only_cached
from ncalign.data.formats.group import TEMPLATE_KWARGS, TOOLS, TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Completion, Refuse, SamplingParams
from ncalign.model.adapters import adapter_base, check_weights, hub_adapter, is_adapter
from ncalign.model.chat import RENDER_SECONDS
from ncalign.model.config import DType
from ncalign.model.pickles import check_weights_file
from ncalign.model.policy import load_config, quiet_transformers
from ncalign.model.quantized import tell_of_whole_base

LOCAL = ("hf", "huggingface", "hf-auto", "vllm", "sglang")
"""Backends that load the model themselves."""

_ENGINES = ("vllm", "sglang")


@dataclass(frozen=True)
class Backend:
    """Which of lm-eval's backends runs a model, and how.

    Attributes:
        name: lm-eval's: ``hf``, ``vllm``, ``local-chat-completions`` and so on.
        arguments: further arguments of the backend, which win over those below.
        batch_size: sequences at a time, or ``auto``.
        device: such as ``cuda:0`` or ``cpu``; None for the backend's choice.
        dtype: of the weights, where the backend loads them; ``auto`` as of ncalign's verbs.
        trust_remote_code: run the code that comes with the model.
    """

    name: str = "hf"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | str | None = 1
    device: str | None = None
    dtype: DType = "auto"
    trust_remote_code: bool = False


def backend_arguments(model: str, backend: Backend) -> dict[str, Any]:
    """The arguments that lm-eval creates the backend with; ``model`` is as in :func:`ncalign.tasks.reasoning.run_tasks`.

    Raises:
        ValueError: the folder is no model, there is none of this name, or its adapter can't be put on its base by this backend.
    """
    if backend.name not in LOCAL:
        return {"model": model, **backend.arguments}
    model = hub_adapter(model, from_cache=only_cached(model, what="model")) or model
    arguments: dict[str, Any] = {"pretrained": model, "dtype": backend.dtype, "trust_remote_code": backend.trust_remote_code}
    # Left to themselves they read pickled weights where they find no others.
    arguments |= {"load_format": "safetensors"} if backend.name in _ENGINES else {"use_safetensors": True}
    folder = Path(model)
    if is_adapter(model):
        base = adapter_base(model)
        check_weights(model)
        tell_of_whole_base(model)
        if backend.name == "sglang":
            raise ValueError(f"{model} is an adapter, which backend sglang can't load: use hf or vllm, or merge it into {base}")
        arguments |= {"pretrained": base, "lora_local_path" if backend.name == "vllm" else "peft": model}
        # Training may have changed the chat template, which lies beside the adapter then.
        if (folder / "tokenizer_config.json").is_file():
            arguments["tokenizer"] = model
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model {model!r} has neither config.json nor adapter_config.json: give a model folder, or a hub id")
    if backend.name not in _ENGINES:
        check_weights_file(load_config(model, trust_remote_code=backend.trust_remote_code), model)
    return {**arguments, **backend.arguments}


def load_backend(backend: Backend, arguments: Mapping[str, Any]) -> Any:
    """lm-eval's model object.

    Raises:
        ValueError: there is no such backend, or it can't load the model.
    """
    from lm_eval.api.registry import get_model

    run_on = {"batch_size": backend.batch_size, "device": backend.device}
    try:
        with quiet_transformers(str(arguments.get("pretrained", ""))):
            return get_model(backend.name).create_from_arg_obj(dict(arguments), run_on)
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        described = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"lm-eval's backend {backend.name!r} can't be made with {described}: {reason}") from error


class BackendGenerator:
    """Samples from an lm-eval model, as a :class:`ncalign.generation.base.Generator`; ``num_tokens`` is always 0.

    Args:
        backend: lm-eval's model object.
        until: texts that end a completion.
    """

    def __init__(self, backend: Any, *, until: Sequence[str] = ()) -> None:
        self._backend, self._until = backend, list(until)
        self.string_prompts: Rendering = "raw"  # as lm-eval asks; its chat template is a setting of the task

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        tools: Sequence[Tools] | None = None,
        template_kwargs: Sequence[TemplateKwargs] | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Completion]]:
        """Sample ``num_samples`` completions for each prompt; lm-eval cuts those that are too long, so none is refused.

        Raises:
            ValueError: the model has no chat template, and a prompt is a conversation; or a prompt has tools, or values for
                the template.
        """
        for name, given in ((TOOLS, tools), (TEMPLATE_KWARGS, template_kwargs)):
            for place, own in enumerate(given or (), start=1):
                if own:
                    raise ValueError(
                        f"prompt {place} has `{name}`, which lm-eval's models are not given: sample with a model in this "
                        "process, a server or vLLM"
                    )
        from lm_eval.api.instance import Instance

        settings: dict[str, Any] = {"until": self._until, "max_gen_toks": params.max_new_tokens, "do_sample": False}
        if params.temperature > 0:
            settings |= {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p}
            if params.top_k:
                settings["top_k"] = params.top_k
        # Greedy answers are all alike.
        asked = num_samples if params.temperature > 0 else 1
        requests = [
            Instance("generate_until", {}, (self._text(prompt), dict(settings)), index)
            for prompt in prompts
            for index in range(asked)
        ]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            texts = iter(self._backend.generate_until(requests))
        rows = [[Completion(next(texts), 0, True) for _ in range(asked)] for _ in prompts]
        return [row * (num_samples // asked) for row in rows]

    def _text(self, prompt: str | list[Message]) -> Any:
        if isinstance(prompt, str):
            return prompt
        try:
            return within(RENDER_SECONDS, lambda: self._backend.apply_chat_template(prompt, add_generation_prompt=True))
        except (ValueError, NotImplementedError, AttributeError, TimeoutError) as error:
            raise ValueError(
                f"the model can't be asked as in a chat: {str(error).splitlines()[0]}; evaluate without apply_chat_template"
            ) from error

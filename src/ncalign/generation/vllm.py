"""Generation with vLLM in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ncalign.core.install import install_hint
from ncalign.data.formats.group import Tools
from ncalign.data.groups import Message
from ncalign.generation.base import Completion, PromptError, Refuse, SamplingParams, tell_refused
from ncalign.generation.local import answer_text, encode_prompts
from ncalign.model.chat import ChatTemplate, resolve_string_prompts
from ncalign.model.config import ControlTokensInText, StringPrompts


class VLLMGenerator:
    """Samples with ``vllm.LLM``; the policy's weights arrive as a saved adapter or a saved model folder.

    Args:
        model: folder or hub id that vLLM starts with.
        tokenizer: the policy's, so that prompts become the same tokens as in training.
        adapter_rank: rank of the adapters that will come; None where whole models will.
        string_prompts: how plain-string prompts are encoded; see :func:`ncalign.model.chat.resolve_string_prompts`.
        control_tokens: what is done with control tokens that are written out in prompts.
        options: further arguments of ``vllm.LLM``.
        today: the date for chat templates that write it; None for that of the call.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter_rank: int | None = None,
        string_prompts: StringPrompts = "auto",
        control_tokens: ControlTokensInText = "keep",
        options: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        try:
            import vllm
        except ImportError:
            raise ValueError(f"generator: vllm needs the package vllm: {install_hint('vllm')}") from None
        adapters = {"enable_lora": True, "max_lora_rank": adapter_rank} if adapter_rank is not None else {}
        self._vllm = vllm
        # Log-probs of the model itself, before temperature and truncation.
        self._engine = vllm.LLM(
            model=model, **{"logprobs_mode": "raw_logprobs", "load_format": "safetensors", **adapters, **(options or {})}
        )
        self._tokenizer, self._control_tokens = tokenizer, control_tokens
        self.string_prompts = resolve_string_prompts(tokenizer, string_prompts)
        self._template = ChatTemplate(tokenizer, today)
        self._turn = self._template.example()
        self._adapter: Any = None
        self._updates = 0

    def load_adapter(self, folder: Path) -> None:
        """Sample with this adapter from now on."""
        from vllm.lora.request import LoRARequest

        # vLLM knows an adapter by its number: a new one for new weights.
        self._updates += 1
        self._adapter = LoRARequest(f"round-{self._updates}", self._updates, str(folder))

    def load_weights(self, folder: Path) -> None:
        """Sample with these weights, of the same architecture, from now on."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        num_samples: int,
        params: SamplingParams,
        seed: int,
        tools: Sequence[Tools] | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see :class:`ncalign.generation.base.Generator`.

        Raises:
            PromptError: a prompt has no tokens, or needs a chat template that is missing.
        """
        found = encode_prompts(self._template, prompts, self.string_prompts, tools=tools, control_tokens=self._control_tokens)
        tell_refused([one for one in found if isinstance(one, PromptError)], refuse)
        places = [index for index, one in enumerate(found) if not isinstance(one, PromptError)]
        inputs = [{"prompt_token_ids": found[index]} for index in places]
        settings = [
            self._vllm.SamplingParams(
                n=num_samples,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=params.max_new_tokens,
                seed=(seed + index) % 2**31,
                logprobs=0,
                stop_token_ids=[self._template.end_id(self._turn)],
            )
            for index in range(len(inputs))
        ]
        outputs = self._engine.generate(inputs, settings, lora_request=self._adapter)
        samples: list[list[Completion]] = [[] for _ in prompts]
        for index, output in zip(places, outputs, strict=True):
            samples[index] = [self._completion(one) for one in output.outputs]
        return samples

    def _completion(self, output: Any) -> Completion:
        ids, finished = tuple(int(token) for token in output.token_ids), output.finish_reason != "length"
        text = str(output.text)
        if self._turn is not None and self._turn.header.strip():
            text = answer_text(self._tokenizer, ids[:-1] if finished else ids, self._turn)
        return Completion(text, len(ids), finished, token_ids=ids, logprob=float(output.cumulative_logprob))

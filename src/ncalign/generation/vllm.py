"""Generation with vLLM in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ncalign.core.install import install_hint
from ncalign.data.formats.group import TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.generation.base import Completion, PromptError, Refuse, SamplingParams, sample_seed, tell_refused
from ncalign.generation.token_prompts import TokenPrompts

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for (``vllm.config.lora.MaxLoRARanks``)."""
_FIT = -1
"""As ``max_model_len``: as many tokens as there is memory for."""


class VLLMGenerator:
    """Samples with ``vllm.LLM``; the policy's weights arrive as a saved adapter or a saved model folder.

    Args:
        model: folder or hub id that vLLM starts with.
        tokens: makes tokens of prompts, and text of tokens.
        adapter_rank: rank of the adapters that will come; None where whole models will.
        max_tokens: of a prompt and its completion, for which the cache has room; None: as many as there is memory for.
        options: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: vLLM is not installed, or takes no adapters of that rank.
    """

    def __init__(
        self,
        model: str,
        tokens: TokenPrompts,
        *,
        adapter_rank: int | None = None,
        max_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import vllm
        except ImportError:
            raise ValueError(f"generator: vllm needs the package vllm: {install_hint('vllm')}") from None
        adapters = {"enable_lora": True, "max_lora_rank": rank_of_vllm(adapter_rank)} if adapter_rank is not None else {}
        self._vllm = vllm
        # Log-probs of the model itself, before temperature and truncation.
        own = {"logprobs_mode": "raw_logprobs", "load_format": "safetensors", "max_model_len": max_tokens or _FIT}
        self._engine = vllm.LLM(model=model, **{**own, **adapters, **(options or {})})
        self._tokens, self.string_prompts = tokens, tokens.string_prompts
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
        template_kwargs: Sequence[TemplateKwargs] | None = None,
        refuse: Refuse | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see :class:`ncalign.generation.base.Generator`.

        Raises:
            PromptError: a prompt has no tokens or too many, or needs a chat template that is missing.
        """
        found = self._tokens.encode(prompts, tools, params.max_new_tokens, template_kwargs=template_kwargs)
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
                seed=sample_seed(seed, index, num_samples),
                logprobs=0,
                stop_token_ids=[self._tokens.end_id],
                detokenize=False,
            )
            for index in places
        ]
        outputs = self._engine.generate(inputs, settings, lora_request=self._adapter)
        samples: list[list[Completion]] = [[] for _ in prompts]
        for index, output in zip(places, outputs, strict=True):
            samples[index] = [self._completion(one) for one in output.outputs]
        return samples

    def _completion(self, output: Any) -> Completion:
        ids = [int(token) for token in output.token_ids]
        return self._tokens.completion(ids, finished=output.finish_reason != "length", logprob=float(output.cumulative_logprob))


def rank_of_vllm(rank: int) -> int:
    """The least rank for which vLLM makes room that holds adapters of this one.

    Raises:
        ValueError: it makes room for none as large.

    >>> rank_of_vllm(24)
    32
    """
    if rank > _RANKS[-1]:
        raise ValueError(
            f"lora.r is {rank}, and vLLM takes adapters of ranks up to {_RANKS[-1]}: lower it, or set push: folder"
        )
    return next(room for room in _RANKS if room >= rank)

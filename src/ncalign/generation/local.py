"""Generation with a transformers model in this process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache

from ncalign.core.errors import names
from ncalign.core.progress import Bar
from ncalign.data.formats.group import TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Completion, PromptError, Refuse, SamplingParams, tell_refused
from ncalign.model.adapters import reason
from ncalign.model.chat import ChatTemplate, RefusedError, Turn, as_messages, resolve_string_prompts
from ncalign.model.config import ControlTokensInText, Precision, StringPrompts
from ncalign.model.control_tokens import ControlTokens, control_notice
from ncalign.model.encoding import beyond
from ncalign.model.limits import limits_of
from ncalign.model.policy import DTYPES, load_model, load_tokenizer

# Rows whose completion has ended stay in the batch until they are this share of it: taking rows out copies the cache.
_COMPACT_AT = 0.2


class TransformersGenerator:
    """Samples from a causal language model, batch by batch.

    A prompt is computed once and its cache repeated for its samples; completions that have ended leave the batch. Each batch
    has a random generator of its own, seeded by ``seed`` and the batch's number, so that results depend on the prompts, the
    settings and the batch size, and not on any global random state. The sampling settings are those given, never the
    defaults of the model's ``generation_config``, of which only the end tokens are used, beside the chat template's.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        string_prompts: how plain-string prompts are encoded; see :func:`ncalign.model.chat.resolve_string_prompts`.
        batch_size: completions sampled at a time.
        autocast: precision to compute in, where it is not that of the weights.
        progress: whether to show a progress bar on stderr.
        control_tokens: what is done with control tokens that are written out in prompts.
        template: the chat template, with the date and the values that it is given; None for the tokenizer's as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        string_prompts: StringPrompts = "auto",
        batch_size: int = 64,
        autocast: torch.dtype | None = None,
        progress: bool = True,
        control_tokens: ControlTokensInText = "keep",
        template: ChatTemplate | None = None,
    ) -> None:
        self._model, self._tokenizer, self._control_tokens = model, tokenizer, control_tokens
        self.string_prompts = resolve_string_prompts(tokenizer, string_prompts)
        self._batch_size, self._autocast, self._progress = batch_size, autocast, progress
        self._template, self._limits = template or ChatTemplate(tokenizer), limits_of(model)
        self._turn = self._template.example()
        self._eos_ids = eos_ids(model, tokenizer) | {self._template.end_id(self._turn)}

    @torch.inference_mode()
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
        """Sample ``num_samples`` completions for each prompt; see :class:`ncalign.generation.base.Generator`.

        Raises:
            PromptError: a prompt does not fit the model's context, or needs a chat template that is missing.
        """
        found = encode_prompts(
            self._template,
            prompts,
            self.string_prompts,
            tools=tools,
            template_kwargs=template_kwargs,
            control_tokens=self._control_tokens,
        )
        found = [self._fitting(index, ids, params.max_new_tokens) for index, ids in enumerate(found)]
        tell_refused([one for one in found if isinstance(one, PromptError)], refuse)
        places = [index for index, one in enumerate(found) if not isinstance(one, PromptError)]
        encoded = [one for one in found if not isinstance(one, PromptError)]
        samples: list[list[Completion]] = [[] for _ in prompts]
        start, num_tokens = time.perf_counter(), 0
        with Bar("Sampling", len(encoded) * num_samples, shown=self._progress) as bar:
            batches = _batches([len(ids) for ids in encoded], num_samples, self._batch_size)
            for number, (indices, repeats) in enumerate(batches):
                # 63 bits that differ for every seed and batch.
                batch_seed = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
                generator = torch.Generator(self._model.device).manual_seed(batch_seed)
                with torch.autocast(self._model.device.type, dtype=self._autocast, enabled=self._autocast is not None):
                    try:
                        rows = self._sample([encoded[index] for index in indices], repeats, params, generator)
                    # A cache of another kind than attention's: it can't be asked for its length, repeated or cut.
                    except (AttributeError, LookupError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
                        raise ValueError(_no_cache(self._model, error)) from error
                for row, (tokens, logprob) in enumerate(rows):
                    samples[places[indices[row // repeats]]].append(self._decode(tokens, logprob))
                num_tokens += sum(len(tokens) for tokens, _ in rows)
                bar.advance(len(rows), note=f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s")
        return samples

    def _fitting(self, index: int, ids: list[int] | PromptError, max_new_tokens: int) -> list[int] | PromptError:
        """A prompt's tokens, if the model has a place for them and for the answer's."""
        if isinstance(ids, PromptError):
            return ids
        context = self._limits.context if self._limits.positions is None else self._limits.positions
        if context is not None and len(ids) + max_new_tokens > context:
            return PromptError(
                index,
                f"its {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the model's context of {context} "
                "tokens: shorten the prompt or lower max_new_tokens",
                reason=f"longer than the model's context of {context} tokens with max_new_tokens={max_new_tokens}",
            )
        problem = beyond([ids], self._tokenizer, self._limits)
        return ids if problem is None else PromptError(index, problem)

    def _sample(
        self, prompts: list[list[int]], repeats: int, params: SamplingParams, generator: torch.Generator
    ) -> list[tuple[list[int], float]]:
        """Sampled tokens of each row, EOS included, and their log-prob; ``repeats`` consecutive rows a prompt."""
        device = self._model.device
        mask, logits, cache = self._prefill(prompts)
        mask, logits = mask.repeat_interleave(repeats, 0), logits.repeat_interleave(repeats, 0)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        warpers = _warpers(params)
        sampled: list[list[int]] = [[] for _ in range(len(mask))]
        logprobs = [0.0] * len(mask)
        rows = list(range(len(mask)))  # which completion each row of the batch is
        ended = [False] * len(mask)
        for step in range(params.max_new_tokens):
            tokens = _next_tokens(logits, warpers, params.temperature, generator)
            for row, token, logprob in zip(rows, tokens.tolist(), _logprobs(logits, tokens), strict=True):
                if not ended[row]:
                    sampled[row].append(token)
                    logprobs[row] += logprob
                    ended[row] = token in self._eos_ids
            live = [position for position, row in enumerate(rows) if not ended[row]]
            if not live or step + 1 == params.max_new_tokens:
                break
            if len(live) <= (1 - _COMPACT_AT) * len(rows):
                keep = torch.tensor(live, device=device)
                rows = [rows[position] for position in live]
                mask, tokens = mask[keep], tokens[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            output = self._model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
        return list(zip(sampled, logprobs, strict=True))

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """Attention mask [B, T], the next token's logits [B, V] and the cache of left-padded prompts."""
        width = max(len(ids) for ids in prompts)
        # What a masked position holds is never read; EOS always exists.
        filler = next(iter(self._eos_ids))
        ids = torch.tensor([[filler] * (width - len(row)) + row for row in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self._model.device)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            # As an index and not as 1, of which transformers makes a view: on a CPU the head multiplies a view of 128 rows
            # 20 to 300 times more slowly than a copy, and with gigabytes of scratch in bfloat16.
            logits_to_keep=torch.tensor([width - 1], device=self._model.device),
        )
        assert isinstance(output.past_key_values, Cache)
        return mask, output.logits[:, -1], output.past_key_values

    def _decode(self, tokens: list[int], logprob: float) -> Completion:
        finished = tokens[-1] in self._eos_ids
        text = answer_text(self._tokenizer, tokens[:-1] if finished else tokens, self._turn)
        return Completion(text, len(tokens), finished, token_ids=tuple(tokens), logprob=logprob)


def load_for_generation(
    model: str, *, dtype: Precision, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model folder's or hub id's model, on the GPU where there is one, and its tokenizer."""
    loaded = load_model(model, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    # nn.Module's own `to`: transformers' wrapper of it lost its type.
    torch.nn.Module.to(loaded, "cuda" if torch.cuda.is_available() else "cpu")
    return loaded, load_tokenizer(model, trust_remote_code=trust_remote_code)


def encode_prompts(
    template: ChatTemplate,
    prompts: Sequence[str | list[Message]],
    string_prompts: Rendering,
    *,
    tools: Sequence[Tools] | None = None,
    template_kwargs: Sequence[TemplateKwargs] | None = None,
    control_tokens: ControlTokensInText = "keep",
) -> list[list[int] | PromptError]:
    """Each prompt's tokens, as the model reads them before it answers.

    ``tools`` is what it may call, for each prompt, and ``template_kwargs`` has further values for the chat template. In the
    place of a prompt that has no tokens, needs a chat template that is missing, or is refused by it, is what to say.
    """
    encoded: list[list[int] | PromptError] = []
    tokenizer, control = template.tokenizer, ControlTokens(template.tokenizer)
    kwargs = template_kwargs or [{}] * len(prompts)
    for index, (prompt, own, given) in enumerate(zip(prompts, tools or [None] * len(prompts), kwargs, strict=True)):
        try:
            if isinstance(prompt, str) and string_prompts == "raw":
                ids = list(tokenizer(prompt, verbose=False)["input_ids"])
                # Some tokenizers close plain text with EOS, after which nothing is left to say.
                while ids and ids[-1] == tokenizer.eos_token_id:
                    ids.pop()
            else:
                texts = (as_messages(prompt), own)
                written = control.found(texts) if control_tokens != "keep" else set()
                if written and control_tokens == "refuse":
                    raise RefusedError(
                        f"it is written with the control tokens {names(sorted(written))} (control_tokens_in_text)"
                    )
                messages, described = control.stood_in(texts) if written else texts
                (ids,) = control.encode([template.prompt(messages, tools=described, kwargs=given)])
        except RefusedError as error:
            encoded.append(PromptError(index, str(error)))
            continue
        encoded.append(ids or PromptError(index, "it has no tokens: a completion needs something before it"))
    return encoded


def prompts_notice(
    tokenizer: PreTrainedTokenizerBase,
    asked: Iterable[tuple[str | list[Message], Tools]],
    string_prompts: Rendering,
    control_tokens: ControlTokensInText = "keep",
) -> str | None:
    """How many prompts are written with control tokens, and what is done with them; None where none is.

    Args:
        tokenizer: the model's.
        asked: prompts, each with what the model may call.
        string_prompts: how prompts that are text are put to the model; raw ones may be whole conversations, and don't count.
        control_tokens: what is done with control tokens that are written out in prompts.
    """
    control = ControlTokens(tokenizer)
    rendered = (one for one in asked if not isinstance(one[0], str) or string_prompts == "user_turn")
    found = [held for one in rendered if (held := control.found(one))]
    escaped = len(found) if control_tokens == "escape" else 0
    return control_notice(len(found), 0, escaped, Counter(name for held in found for name in held))


def _no_cache(model: PreTrainedModel | PeftModel, error: Exception) -> str:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        f"{type(inner).__name__} keeps what it has read in a way that can't be sampled from here ({reason(error)}): let a "
        "server or vLLM sample from it"
    )


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], turn: Turn | None) -> str:
    """The text of a sampled answer, without the end token: what the chat template writes in front of it is no part of it."""
    if turn is not None and turn.header.strip():
        header = tokenizer(turn.header, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = tokens[len(header) :] if list(tokens[: len(header)]) == header else tokens
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def eos_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a completion.

    Raises:
        ValueError: there is none.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    found = frozenset(int(token) for token in ids if token is not None)
    if not found:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token, so completions would never end: "
            "set eos_token in its tokenizer_config.json"
        )
    return found


def _batches(lengths: list[int], num_samples: int, batch_size: int) -> list[tuple[list[int], int]]:
    """Prompts of like length together: (their indices, samples of each) per batch, the longest batch first.

    The longest come first so that a batch that does not fit in memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    for drawn in range(0, num_samples, batch_size):
        repeats = min(batch_size, num_samples - drawn)
        at_once = max(1, batch_size // repeats)
        batches += [(order[start : start + at_once], repeats) for start in range(0, len(order), at_once)]
    return batches


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Log-probs of one token a row, from logits [rows, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values: list[float] = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)).tolist()
    return values


def _next_tokens(
    logits: torch.Tensor, warpers: LogitsProcessorList, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """One token a row, from logits [rows, V]."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    scores = logits.float()
    for warp in warpers:
        # These processors look at the scores alone; the token ids that their interface asks for are not used.
        scores = warp(torch.empty(0, dtype=torch.long), scores)
    # Inverse transform sampling: one uniform number a row, where torch.multinomial would draw one a token of the vocabulary.
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator)
    # right=True: the first token whose cumulative probability exceeds the draw, so one of probability 0 is never taken.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp(max=scores.shape[-1] - 1)

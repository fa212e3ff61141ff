"""A model in a conversation: what was said so far, and its next answer, shown while it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ncalign.data.groups import Message
from ncalign.generation.base import PromptError, SamplingParams
from ncalign.generation.local import answer_text, encode_prompts, eos_ids
from ncalign.model.chat import ChatTemplate, resolve_string_prompts
from ncalign.model.config import ControlTokensInText
from ncalign.model.limits import filler_id, limits_of
from ncalign.model.policy import quiet_transformers

Show = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        prompt: what was answered: the conversation until then.
        text: the answer.
        num_tokens: sampled, the end token included.
        finished: whether the model ended it.
        stopped: whether Ctrl-C did; an answer that is neither finished nor stopped was cut.
    """

    prompt: str | list[Message]
    text: str
    num_tokens: int
    finished: bool
    stopped: bool


class _Stopping(StoppingCriteria):
    """Ends the sampling after the token at which an event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)


class Speaker:
    """A model with its conversation.

    Args:
        name: what it is called.
        model: the model, in evaluation mode; its generation settings are replaced by ``params``.
        tokenizer: its tokenizer; without a chat template the model goes on with the plain text of the conversation.
        template: the chat template, with the date and the values that it is given.
        params: how answers are sampled.
        system: the system prompt.
        control_tokens: what is done with control tokens that are written out in what is typed.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: ChatTemplate,
        params: SamplingParams,
        system: str | None,
        control_tokens: ControlTokensInText,
    ) -> None:
        self.name, self._model, self._tokenizer = name, model, tokenizer
        self._template, self._params, self._system, self._control = template, params, system, control_tokens
        self._turn = template.example()
        self._rendering = resolve_string_prompts(tokenizer, "auto")
        self._ends = eos_ids(model, tokenizer) | {template.end_id(self._turn)}
        limits = limits_of(model)
        self._context = limits.context if limits.positions is None else limits.positions
        # Not the model's own settings: the sampling is that which was asked for, and nothing else.
        sampling: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        model.generation_config = GenerationConfig(
            do_sample=params.temperature > 0,
            eos_token_id=sorted(self._ends),
            pad_token_id=filler_id(model, tokenizer),
            **(sampling if params.temperature > 0 else {}),
        )
        self.reset()

    @property
    def plain(self) -> bool:
        """Whether the model has no chat template, and goes on with plain text."""
        return self._rendering == "raw"

    def reset(self) -> None:
        """Forget what was said."""
        self._said: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        self._text = f"{self._system}\n" if self._system else ""

    def answer(self, line: str, *, seed: int, show: Show) -> Answer:
        """Answer a line; the conversation goes on from there, unless the answer was stopped before its first letter.

        Args:
            line: what was typed.
            seed: of the sampling.
            show: is given the answer piece by piece.

        Raises:
            ValueError: the chat template refuses the conversation, or it is longer than the model's context; the line is not
                kept then.
        """
        prompt: str | list[Message] = self._text + line if self.plain else [*self._said, {"role": "user", "content": line}]
        (ids,) = encode_prompts(self._template, [prompt], self._rendering, control_tokens=self._control)
        if isinstance(ids, PromptError):
            raise ValueError(f"{self.name} can't be asked this: {ids.detail}")
        room = self._params.max_new_tokens if self._context is None else self._context - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and {self.name} has a context of {self._context}: /reset begins anew"
            )
        sampled, stopped = self._sample(ids, min(room, self._params.max_new_tokens), seed, show)
        finished = bool(sampled) and sampled[-1] in self._ends
        text = answer_text(self._tokenizer, sampled[:-1] if finished else sampled, self._turn)
        if text or not stopped:
            self._said += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]
            self._text += f"{line}{text}\n"
        return Answer(prompt, text, len(sampled), finished, stopped)

    def _sample(self, ids: list[int], max_new_tokens: int, seed: int, show: Show) -> tuple[list[int], bool]:
        """The sampled tokens, and whether Ctrl-C ended them; they are sampled in a thread of their own while they are shown."""
        pieces = TextIteratorStreamer(
            self._tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        stop, outcome = threading.Event(), Future[list[int]]()

        def work() -> None:
            try:
                outcome.set_result(self._generate(ids, max_new_tokens, seed, pieces, stop))
            except BaseException as error:
                outcome.set_exception(error)
                pieces.end()

        # A daemon: a second Ctrl-C ends the program and not only the answer.
        threading.Thread(target=work, name="answer", daemon=True).start()
        stopped = False
        try:
            try:
                for piece in pieces:
                    show(piece)
            except KeyboardInterrupt as interruption:
                # SIGTERM, which is raised as a kind of Ctrl-C, ends the program.
                if type(interruption) is not KeyboardInterrupt:
                    raise
                stopped = True
                stop.set()
                for piece in pieces:
                    show(piece)
        finally:
            stop.set()
        return outcome.result(), stopped

    @torch.inference_mode()
    def _generate(
        self, ids: list[int], max_new_tokens: int, seed: int, pieces: TextIteratorStreamer, stop: threading.Event
    ) -> list[int]:
        device = self._model.device
        prompt = torch.tensor([ids], device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), quiet_transformers():
            torch.manual_seed(seed)
            generate: Any = self._model.generate
            found = generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                streamer=pieces,
                stopping_criteria=StoppingCriteriaList([_Stopping(stop)]),
            )
        sampled: list[int] = found[0, len(ids) :].tolist()
        return sampled

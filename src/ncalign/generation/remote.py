"""Generation on an OpenAI-compatible server."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ncalign.core.progress import Bar, say
from ncalign.core.store import Store
from ncalign.data.formats.group import TEMPLATE_KWARGS, TOOLS, TemplateKwargs, Tools
from ncalign.data.groups import Message
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Completion, PromptError, Refuse, SamplingParams, sample_seed, tell_refused
from ncalign.generation.client import Server
from ncalign.generation.config import ServerConfig
from ncalign.generation.failures import ServerError
from ncalign.generation.questions import Request
from ncalign.generation.token_prompts import TokenPrompts
from ncalign.generation.wire import Choice
from ncalign.model.chat import as_messages, is_half_written
from ncalign.model.config import StringPrompts
from ncalign.model.thoughts import without_thoughts

_CONTINUES = (
    "note: {count} prompts end with a half-written assistant's turn: the server is asked to go on with it "
    "(continue_final_message), as vLLM, SGLang and llama.cpp do. OpenAI's API can't; look at the first answers of any other"
)
_TOOLS = (
    f"note: {{count}} prompts have `{TOOLS}`: the server is sent them, and asked for text and no calls (tool_choice none). "
    "vLLM and llama.cpp show them to the model then; SGLang, and vLLM with --exclude-tools-when-tool-choice-none, do not"
)
_KWARGS = (
    f"note: {{count}} prompts have `{TEMPLATE_KWARGS}`: the server is sent them, as vLLM, SGLang and llama.cpp take them for "
    "their chat template"
)
_UNTOLD = f"note: `{TOOLS}` of {{count}} prompts that are plain text are not sent to the server: only a chat has them"
_UNTOLD_KWARGS = _UNTOLD.replace(TOOLS, TEMPLATE_KWARGS)
_NOTHING: TemplateKwargs = {}


class ServerGenerator:
    """Samples from a model on a server, many prompts at once; what the server has answered before is not asked again.

    A conversation goes to the chat API, whose server applies the chat template; a prompt that is a string does so too, as a
    user's turn, or goes to the completions API as it is. With ``tokens`` all prompts go there as token ids, and token ids come
    back (vLLM's ``return_token_ids``): the server applies no template, and no text is encoded a second time.

    Args:
        config: where the server is, and how it may be asked.
        store: keeps answers by what was asked.
        string_prompts: whether plain-string prompts are sent as they are or as a user's turn; ``auto`` is a user's turn, since
            nothing tells here whether the server has a chat template.
        tokens: makes tokens of prompts and text of tokens; None: the server does both.
        progress: whether to show a progress bar on stderr.
        template_kwargs: further values for the server's chat template; those of a prompt take their place.
        strip_thoughts: whether turns before a prompt's last question are sent without their thoughts.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        store: Store | None = None,
        string_prompts: StringPrompts = "auto",
        tokens: TokenPrompts | None = None,
        progress: bool = True,
        template_kwargs: TemplateKwargs = _NOTHING,
        strip_thoughts: bool = False,
    ) -> None:
        self.server, self._tokens = Server(config, store), tokens
        self._kwargs, self._strips = dict(template_kwargs), strip_thoughts
        self.string_prompts: Rendering = "user_turn" if string_prompts == "auto" else string_prompts
        if tokens is not None:
            self.string_prompts = tokens.string_prompts
        self._chosen, self._progress = string_prompts != "auto", progress
        self._said: set[str] = set()

    def each(self) -> dict[str, ServerGenerator]:
        """A generator for each server, by its URL, which asks that one alone."""
        found = {}
        for url in self.server.config.urls:
            found[url] = copy.copy(self)
            found[url].server = self.server.alone(url)
        return found

    def record(self) -> dict[str, object]:
        """What results say of the fields that the server does not take: nothing where it takes all."""
        return {"server_fields": dict(self.server.changes)} if self.server.changes else {}

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

        A prompt for which the server gives fewer completions than asked for, after all retries, has fewer.

        Raises:
            PromptError: the server refuses a prompt, and nobody is told of it; what it answered is kept.
            ServerError: the server fails; what it answered is kept, and the same call goes on from there.
        """
        if self._tokens is None:
            given = list(zip(prompts, tools or [None] * len(prompts), template_kwargs or [{}] * len(prompts), strict=True))
            self._say_what_is_sent(given)
            requests = {
                index: self._request(*one, num_samples, _sampling(params, sample_seed(seed, index, num_samples)))
                for index, one in enumerate(given)
            }
        else:
            encoded = self._tokens.encode(prompts, tools, params.max_new_tokens, template_kwargs=template_kwargs)
            tell_refused([one for one in encoded if isinstance(one, PromptError)], refuse)
            requests = {
                index: self._of_tokens(one, self._tokens, num_samples, params, sample_seed(seed, index, num_samples))
                for index, one in enumerate(encoded)
                if not isinstance(one, PromptError)
            }
        with Bar("Sampling on the server", len(requests), shown=self._progress) as bar:
            found = dict(zip(requests, self.server.ask(list(requests.values()), done=lambda index: bar.advance()), strict=True))
        self._tell_failed(
            {index: answer for index, answer in found.items() if isinstance(answer, ServerError)}, prompts, tools, refuse
        )
        samples: list[list[Completion]] = [[] for _ in prompts]
        for index, answer in found.items():
            samples[index] = [] if isinstance(answer, ServerError) else [self._completion(choice) for choice in answer]
        return samples

    def _tell_failed(
        self,
        failed: Mapping[int, ServerError],
        prompts: Sequence[str | list[Message]],
        tools: Sequence[Tools] | None,
        refuse: Refuse | None,
    ) -> None:
        """Tell of the prompts that the server refuses, or raise where it fails."""
        if not failed:
            return
        place, first = next(iter(failed.items()))
        hint = ""
        if first.refused and self._tokens is not None:
            hint = "; prompts were sent as token ids, as vLLM takes them: for another server, --server_prompts text"
        elif first.refused and not self._chosen and any(isinstance(prompt, str) for prompt in prompts):
            hint = "; string prompts were sent as a user's turn: for a model without chat template, --string_prompts raw"
        if first.refused and self._tokens is None and tools and tools[place]:
            hint += f"; `{TOOLS}` were sent with tool_choice none: leave them out for a server that takes neither"
        if first.refused and TEMPLATE_KWARGS in str(first):
            hint += f"; leave `{TEMPLATE_KWARGS}` out for a server that does not take them"
        others = f"{len(failed)} of {len(prompts)} prompts have no completion; the others' are kept: rerun to go on"
        message = f"{first} ({others}{hint})"
        # Where nothing at all is answered, it is not the prompts.
        if len(failed) == len(prompts) or not all(answer.refused for answer in failed.values()):
            raise ServerError(message)
        if refuse is None:
            raise PromptError(place, message)
        for index, answer in failed.items():
            refuse(PromptError(index, str(answer), reason="refused by the server"))

    def _say_what_is_sent(self, given: Sequence[tuple[str | list[Message], Tools, TemplateKwargs]]) -> None:
        """Say, once of each, what of these prompts and their tools a server may do otherwise than a model in this process."""
        counts = {
            _CONTINUES: sum(isinstance(prompt, list) and is_half_written(prompt) for prompt, _, _ in given),
            _TOOLS: sum(bool(tools) and not self._is_raw(prompt) for prompt, tools, _ in given),
            _UNTOLD: sum(bool(tools) and self._is_raw(prompt) for prompt, tools, _ in given),
            _KWARGS: sum(bool(self._kwargs or kwargs) and not self._is_raw(prompt) for prompt, _, kwargs in given),
            _UNTOLD_KWARGS: sum(bool(self._kwargs or kwargs) and self._is_raw(prompt) for prompt, _, kwargs in given),
        }
        for notice, count in counts.items():
            if count and notice not in self._said:
                self._said.add(notice)
                say(notice.format(count=count))

    def _is_raw(self, prompt: str | list[Message]) -> bool:
        return isinstance(prompt, str) and self.string_prompts == "raw"

    def _request(
        self, prompt: str | list[Message], tools: Tools, kwargs: TemplateKwargs, num_samples: int, body: dict[str, Any]
    ) -> Request:
        raw = self._is_raw(prompt)
        if self.server.config.logprobs:
            body["logprobs"] = 1 if raw else True  # a number of alternatives there, a switch here
        if raw:
            return Request("completions", {**body, "prompt": prompt}, num_samples)
        messages = as_messages(prompt)
        messages = without_thoughts(messages) if self._strips else messages
        if is_half_written(messages):
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        # Completions are texts: an answer that the server takes for a call would come without any.
        needed: dict[str, Any] = {"tools": tools, "tool_choice": "none"} if tools else {}
        if given := {**self._kwargs, **kwargs}:
            needed[TEMPLATE_KWARGS] = given
        return Request("chat", {**body, "messages": messages, **needed}, num_samples, needed=frozenset(needed))

    def _of_tokens(self, ids: list[int], tokens: TokenPrompts, num_samples: int, params: SamplingParams, seed: int) -> Request:
        body = {**_sampling(params, seed), "prompt": ids, "return_token_ids": True, "stop_token_ids": [tokens.end_id]}
        if self.server.config.logprobs:
            body["logprobs"] = 0
        return Request("completions", body, num_samples)

    def _completion(self, choice: Choice) -> Completion:
        if self._tokens is not None and choice.token_ids is not None:
            return self._tokens.completion(choice.token_ids, finished=choice.finished, logprob=choice.logprob)
        # Servers that do not count tokens are counted by words, for the reports alone.
        number = choice.num_tokens if choice.num_tokens is not None else len(choice.text.split())
        return Completion(choice.text, number, choice.finished, logprob=choice.logprob)


def _sampling(params: SamplingParams, seed: int) -> dict[str, Any]:
    """How to sample, in the words of OpenAI's API."""
    body: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_new_tokens,
        "seed": seed,
    }
    # Not OpenAI's own, but what vLLM, SGLang and llama.cpp call it.
    return {**body, "top_k": params.top_k} if params.top_k else body

"""Groups → token ids: chat template, prompt/completion boundary, EOS and truncation.

One rule each, for a whole group:

* **Boundary.** Prompt and completion are encoded as one text and split where the prompt's own tokens end. Where these are not
  a prefix of the whole text's tokens (a token merged across the boundary), the completion is encoded on its own, after the
  prompt's tokens, as it is when the model generates; such candidates are counted. What a chat template writes between its
  generation prompt and an answer is scored with the answer (:mod:`ncalign.model.chat`).
* **EOS.** The completion ends with exactly one end token, and it is scored: the one that the chat template puts after an
  assistant's turn, or the tokenizer's EOS where the template puts none or there is no template. A candidate that is not
  ``finished``, cut while it was generated, has none.
* **Truncation.** When the prompt and the longest completion exceed ``max_length``, the prompt keeps its end (at least
  ``max_prompt_length`` tokens with BOS, which stays in front) and all completions are cut at the same length. A cut completion
  has no EOS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ncalign.core.errors import names
from ncalign.data.formats.group import TOOLS, Message, Tools
from ncalign.data.groups import Candidate, Group
from ncalign.model.chat import RefusedError, Turn, answered, as_messages, resolve_string_prompts
from ncalign.model.config import ControlTokensInText, EncodingConfig, StringPrompts, template_kwargs
from ncalign.model.control_tokens import ControlTokens
from ncalign.model.conversations import Asked, ConversationRules, Placed, end_tokens, is_plain, placed, shared_length
from ncalign.model.encoded import DroppedGroupError, EncodedGroup, EncodingReport
from ncalign.model.limits import Limits
from ncalign.model.thoughts import outside_thoughts
from ncalign.model.untold import left_out, left_out_of_answers

Texts = TypeVar("Texts")
_NO_LIMITS = Limits()
_ALL = ConversationRules()
__all__ = ["DroppedGroupError", "EncodedGroup", "Encoder", "EncodingReport", "beyond", "check_limits", "make_encoder"]


class _Tokens(NamedTuple):
    """A group's prompt and completions; of each completion, which tokens are scored, None for all."""

    prompt: list[int]
    completions: list[list[int]]
    scored: list[list[bool] | None]


class Encoder:
    """Encodes groups for one tokenizer, under one set of rules.

    Args:
        tokenizer: the model's tokenizer.
        max_length: most tokens of a prompt and its completion.
        max_prompt_length: prompt tokens kept when the two exceed ``max_length``; half of it by default.
        string_prompts: how plain-string prompts are encoded; see :func:`ncalign.model.chat.resolve_string_prompts`.
        control_tokens: what is done with control tokens that are written out in texts.
        today: the date for chat templates that write it; None for that of the call.
        limits: what the model has a place for.
        rules: what is scored of completions that are conversations, and what their template is given.

    Raises:
        ValueError: ``max_prompt_length`` leaves completions no room, or the template does not read what it is to be given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        string_prompts: StringPrompts = "auto",
        control_tokens: ControlTokensInText = "keep",
        today: date | None = None,
        limits: Limits = _NO_LIMITS,
        rules: ConversationRules = _ALL,
    ) -> None:
        if max_prompt_length is None:
            max_prompt_length = max_length // 2
        if not 1 <= max_prompt_length < max_length:
            raise ValueError(
                f"max_prompt_length is {max_prompt_length} and max_length {max_length}: completions need room; "
                "max_prompt_length must be at least 1 and less than max_length"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.string_prompts = resolve_string_prompts(tokenizer, string_prompts)
        self.report = EncodingReport()
        self._bos = _bos_id(tokenizer)
        self._template, self._limits, self._rules = rules.template(tokenizer, today), limits, rules
        self._control, self._control_as = ControlTokens(tokenizer), control_tokens

    def encode(self, group: Group) -> EncodedGroup:
        """Encode a group.

        Raises:
            DroppedGroupError: a completion is empty or has an EOS inside, or the group needs a chat template and there is none,
                or it refuses the group or leaves out what is scored, or the model has no place for a token; the group is
                counted as dropped.
        """
        try:
            prompt, completions, masks = self._truncate(group, self._tokens(group))
            check_limits(group, [prompt, *completions], self.tokenizer, self._limits)
        except DroppedGroupError as dropped:
            self.report.dropped[dropped.reason] += 1
            raise
        encoded = EncodedGroup(
            id=group.id,
            origin=group.origin or "",
            prompt=np.asarray(prompt, dtype=np.int32),
            completions=tuple(np.asarray(completion, dtype=np.int32) for completion in completions),
            rewards=tuple(candidate.reward for candidate in group.candidates),
            reference_logprobs=tuple(candidate.reference_logprob for candidate in group.candidates),
            scored=tuple(None if mask is None else np.asarray(mask) for mask in masks) if any(masks) else (),
        )
        self.report.untold.update(self.left_out(group))
        scored = sum(map(encoded.num_scored, range(len(completions))))
        self.report.groups += 1
        self.report.candidates += len(completions)
        self.report.scored_tokens += scored
        self.report.tokens += encoded.num_tokens + len(prompt) * (len(completions) - 1)
        self.report.longest = max(self.report.longest, encoded.length)
        return encoded

    def left_out(self, group: Group) -> list[str]:
        """What the group holds beside roles and texts, and its tokens don't."""
        tools, kwargs = group.tools, group.template_kwargs
        told = left_out(self._template, group.prompt, self.string_prompts, tools=tools, kwargs=kwargs)
        if isinstance(group.prompt, str) and self.string_prompts == "raw":
            return told
        messages, found = as_messages(group.prompt), dict[str, None]()
        for completion in (one.completion for one in group.candidates if isinstance(one.completion, list)):
            found |= dict.fromkeys(left_out_of_answers(self._template, messages, completion, tools=tools, kwargs=kwargs))
        return [*found, *told]

    def _tokens(self, group: Group) -> _Tokens:
        as_chat = not isinstance(group.prompt, str) or self.string_prompts == "user_turn"
        bodies: list[str | Placed] = []
        if as_chat:
            turn, bodies = self._chat_bodies(group)
            prompt_text, end_id = turn.prompt, self._template.end_id(turn)
        else:
            assert isinstance(group.prompt, str)
            prompt_text, end_id = group.prompt, int(self.tokenizer.eos_token_id)
            bodies += [prompt_text + self._content(candidate, group, end_id) for candidate in group.candidates]
        prompt, *encoded = self._control.encode([prompt_text, *(body for body in bodies if isinstance(body, str))])
        whole = iter(encoded)
        completions: list[list[int]] = []
        masks: list[list[bool] | None] = []
        wholes: dict[int, tuple[list[int], list[bool]]] = {}
        hides_thoughts = False
        for number, (candidate, body) in enumerate(zip(group.candidates, bodies, strict=True)):
            tokens, mask = list[int](), None
            if isinstance(body, str):
                tokens = self._split(group, prompt, body[len(prompt_text) :], next(whole), end_id)
                mask = self._thoughtless(prompt, prompt_text, body) if self._rules.thoughts == "masked" else None
                if not candidate.finished:
                    tokens, mask = tokens[:-1], mask and mask[:-1]
            else:
                wholes[number] = self._scored(group, body, finished=candidate.finished)
                hides_thoughts |= body.hides_thoughts
            completions.append(tokens)
            masks.append(None if mask is None or all(mask) else mask)
        if not as_chat and self._bos is not None and prompt[:1] != [self._bos]:
            prompt = [self._bos, *prompt]
        if not prompt:
            raise DroppedGroupError(group, "empty prompt", "the prompt has no tokens: a completion needs something before it")
        if hides_thoughts and self._rules.thoughts != "stripped":
            self.report.untold[_HIDDEN] += 1
        tokens_of_all = _Tokens(prompt, completions, masks)
        return self._aligned(group, tokens_of_all, wholes) if wholes else tokens_of_all

    def _thoughtless(self, prompt: list[int], prompt_text: str, body: str) -> list[bool]:
        """Which tokens of a completion lie outside its thoughts, its end token among them, as :meth:`_split` splits them."""
        spans = outside_thoughts(body, [(len(prompt_text), len(body))])
        ids, inside = self._control.encode_spans(body, spans)
        if ids[: len(prompt)] == prompt:
            return [*inside[len(prompt) :], True]
        moved = [(start - len(prompt_text), end - len(prompt_text)) for start, end in spans]
        return [*self._control.encode_spans(body[len(prompt_text) :], moved)[1], True]

    def _scored(self, group: Group, body: Placed, *, finished: bool) -> tuple[list[int], list[bool]]:
        """Tokens of a prompt with its completion, up to the last scored one, and which of them are scored."""
        try:
            ids, inside = self._control.encode_spans(body.text, body.spans)
        except ValueError as error:
            raise DroppedGroupError(group, "unsplittable boundary", str(error)) from error
        if not any(inside):
            raise DroppedGroupError(group, "empty completion", _EMPTY)
        last = len(inside) - inside[::-1].index(True)
        ending = [] if body.has_end or not finished else [int(self.tokenizer.eos_token_id)]
        return [*ids[:last], *ending], [*inside[:last], *(True for _ in ending)]

    def _aligned(self, group: Group, tokens: _Tokens, wholes: Mapping[int, tuple[list[int], list[bool]]]) -> _Tokens:
        """The group with completions that were encoded with their prompt: the prompt is what all begin with.

        Where a template writes the prompt otherwise once a completion follows, the rest of it is encoded with every completion.
        """
        prompt, completions, masks = tokens
        shared = shared_length(prompt, *(ids for ids, _ in wholes.values()))
        shared = min(shared, *(mask.index(True) for _, mask in wholes.values()))
        self.report.rewritten += sum(ids[: len(prompt)] != prompt for ids, _ in wholes.values())
        if not shared:
            raise DroppedGroupError(
                group,
                "a template that rewrites the prompt",
                "the chat template writes the prompt otherwise, from its first token on, where a completion follows: give each "
                "completion a group of its own, or use another template",
            )
        rest = prompt[shared:]
        for number, (completion, mask) in enumerate(zip(completions, masks, strict=True)):
            if number in wholes:
                ids, inside = wholes[number]
                completions[number], masks[number] = ids[shared:], None if all(inside[shared:]) else inside[shared:]
            elif rest:
                completions[number] = [*rest, *completion]
                masks[number] = [*(False for _ in rest), *(mask or (True for _ in completion))]
        return _Tokens(prompt[:shared], completions, masks)

    def _chat_bodies(self, group: Group) -> tuple[Turn, list[str | Placed]]:
        """The turn of the group's answers, and each candidate's whole text: to its end token, or with what of it is scored."""
        bodies: list[str | Placed] = []
        messages, tools = self._treated((as_messages(group.prompt), group.tools), group, what="prompt")
        kwargs = group.template_kwargs
        try:
            turn = self._turn(group, messages, tools)
            asked = Asked(messages, tools, kwargs, turn)
            for candidate in group.candidates:
                if not is_plain(candidate.completion):
                    bodies.append(self._conversation(candidate, group, asked))
                    continue
                text = self._content(candidate, group, self._template.end_id(turn))
                whole = answered(messages, text)
                full = self._template.render(whole, tools=tools, what="the prompt with its completion", kwargs=kwargs)
                bodies.append(self._body(turn, text, full) + turn.before_end)
        except RefusedError as error:
            raise DroppedGroupError(group, str(error), str(error)) from error
        return turn, bodies

    def _turn(self, group: Group, messages: list[Message], tools: Tools) -> Turn:
        """Where the group's answers stand; a prompt that no plain answer may follow can still be followed by turns."""
        kwargs = group.template_kwargs
        try:
            return self._template.turn(messages, tools=tools, kwargs=kwargs)
        except RefusedError:
            if any(is_plain(candidate.completion) for candidate in group.candidates):
                raise
            prompt, example = self._template.render(messages, tools=tools, kwargs=kwargs), self._template.example()
            return Turn(prompt, "", "", None if example is None else example.end, "")

    def _conversation(self, candidate: Candidate, group: Group, asked: Asked) -> Placed:
        """A completion of turns with its prompt, and what of it is scored."""
        assert isinstance(candidate.completion, list)
        ends = end_tokens(self._template, asked.turn)
        turns = [
            {**turn, "content": self._without_end(turn["content"], ends)} if turn["role"] == "assistant" else turn
            for turn in candidate.completion
        ]
        treated = self._treated(turns, group, what="completion")
        if asked.tools and any(turn.get("tool_calls") for turn in turns):
            shown = left_out(self._template, asked.messages, self.string_prompts, tools=asked.tools, kwargs=asked.kwargs)
            if TOOLS in shown:
                raise RefusedError(
                    f"the chat template leaves out `{TOOLS}`, which a completion calls: use a template that writes them, or "
                    f"tell of them in the system's turn and leave `{TOOLS}` out"
                )
        written = [json.dumps(turn, ensure_ascii=False) for turn in treated if turn["role"] == "assistant"]
        if any(end in text for end in ends for text in written):
            raise DroppedGroupError(group, *_EOS_INSIDE)
        return placed(self._template, asked, treated, self._rules, finished=candidate.finished)

    def _without_end(self, text: str, ends: Sequence[str]) -> str:
        """A text without end tokens at its end, which a template would follow with white space of its own."""
        content = text
        while content.rstrip().endswith(tuple(ends)):
            stripped = content.rstrip()
            content = stripped[: -max(len(end) for end in ends if stripped.endswith(end))]
        self.report.repeated_eos += content != text
        return content

    def _body(self, turn: Turn, text: str, full: str) -> str:
        """A prompt with its answer's header and text, as the template writes them in ``full`` where these are the answer's."""
        body = full[: len(full) - len(turn.after)]
        rest = body[len(turn.prompt) :]
        # Templates may trim the answer or put white space around it; any other change is not the generated text.
        same = text.strip() in (rest.strip(), rest.removeprefix(turn.header).strip())
        if same and full.startswith(turn.prompt) and full.endswith(turn.after):
            return body
        self.report.template_mismatches += 1
        # An answer that brings a thought of its own gets none of the template's.
        return turn.prompt + (turn.header if full.startswith(turn.prompt + turn.header) else "") + text

    def _content(self, candidate: Candidate, group: Group, end_id: int) -> str:
        """The completion's text without end tokens at its end, which a template would follow with white space of its own."""
        completion = candidate.completion
        if not is_plain(completion):
            detail = "a completion of turns follows a prompt that is given as plain text: give the prompt as turns too"
            raise DroppedGroupError(group, "turns after plain text", detail)
        text = completion if isinstance(completion, str) else str(completion[0]["content"])
        ends = self.tokenizer.convert_ids_to_tokens([end_id, int(self.tokenizer.eos_token_id)])
        content = self._without_end(text, ends)
        if not content.strip():
            raise DroppedGroupError(group, "empty completion", _EMPTY)
        return self._treated(content, group, what="completion")

    def _treated(self, texts: Texts, group: Group, *, what: Literal["prompt", "completion"]) -> Texts:
        """Texts as they are put together: control tokens in them are counted, refused, or stood in for."""
        found = self._control.found(texts)
        if not found:
            return texts
        self.report.control_tokens.update(found)
        self.report.control_prompts += what == "prompt"
        self.report.control_completions += what == "completion"
        if self._control_as == "refuse":
            detail = (
                f"its {what} is written with the control tokens {names(sorted(found))}: remove them, or encode them as text"
            )
            raise DroppedGroupError(group, f"control tokens in a {what}", f"{detail} (control_tokens_in_text: escape)")
        if self._control_as == "keep":
            return texts
        self.report.control_escaped += 1
        return self._control.stood_in(texts)

    def _split(self, group: Group, prompt: list[int], rest: str, ids: list[int], end_id: int) -> list[int]:
        """The completion's tokens, with exactly one end token."""
        if ids[: len(prompt)] == prompt:
            completion = ids[len(prompt) :]
        else:
            (completion,) = self._control.encode([rest])
            self.report.boundary_merges += 1
            if self.tokenizer.decode(prompt + completion) != self.tokenizer.decode(ids):
                raise DroppedGroupError(
                    group,
                    "unsplittable boundary",
                    "the tokenizer merges prompt and completion into one token and can't encode the completion alone "
                    f"(it begins {self._control.as_written(rest)[:20]!r}); end the prompt at a word boundary",
                )
        ends = {end_id, int(self.tokenizer.eos_token_id)}
        if not completion:
            raise DroppedGroupError(group, "empty completion", _EMPTY)
        if not ends.isdisjoint(completion):
            raise DroppedGroupError(group, *_EOS_INSIDE)
        return [*completion, end_id]

    def _truncate(self, group: Group, tokens: _Tokens) -> _Tokens:
        prompt, completions, masks = tokens
        longest = max(len(completion) for completion in completions)
        if len(prompt) + longest <= self.max_length:
            return tokens
        kept = min(len(prompt), max(self.max_prompt_length, self.max_length - longest))
        room = self.max_length - kept
        self.report.prompts_truncated += kept < len(prompt)
        self.report.completions_truncated += sum(len(completion) > room for completion in completions)
        self.report.first_truncated = self.report.first_truncated or _where(group).removesuffix(": ")
        # Models lean on BOS: what is cut off stands after it.
        first = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        prompt = [*first, *prompt[len(prompt) - kept + len(first) :]]
        masks = [mask and mask[:room] for mask in masks]
        if any(mask is not None and not any(mask) for mask in masks):
            raise DroppedGroupError(
                group,
                "nothing scored within max_length",
                f"the first scored turn of a completion lies beyond max_length ({self.max_length}): raise it",
            )
        return _Tokens(prompt, [completion[:room] for completion in completions], masks)


_HIDDEN = "thoughts of earlier answers"
_EMPTY = "a completion is empty: there is nothing to score"
_EOS_INSIDE = ("EOS inside a completion", "a completion has an end token in its middle: remove it, or cut the text there")


def make_encoder(tokenizer: PreTrainedTokenizerBase, rules: EncodingConfig, *, limits: Limits) -> Encoder:
    """The encoder that a configuration describes, for a model with these limits."""
    return Encoder(
        tokenizer,
        max_length=rules.max_length,
        max_prompt_length=rules.max_prompt_length,
        string_prompts=rules.string_prompts,
        control_tokens=rules.control_tokens_in_text,
        today=rules.template_date,
        limits=limits,
        rules=conversation_rules(rules),
    )


def conversation_rules(rules: EncodingConfig) -> ConversationRules:
    """What a configuration says of completions that are conversations."""
    return ConversationRules(rules.scored_turns, rules.thoughts, template_kwargs(rules.chat_template_kwargs))


def check_limits(group: Group, texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """Raise where a model has no place for the tokens of a prompt and its completions.

    Args:
        group: named in the message.
        texts: the prompt's tokens, and those of each text that follows it.
        tokenizer: puts tokens into words.
        limits: the model's.

    Raises:
        DroppedGroupError: it has no embedding for a token, or no position for the last one.
    """
    if problem := beyond(texts, tokenizer, limits):
        raise DroppedGroupError(group, problem, problem)


def beyond(texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> str | None:
    """What of a prompt's tokens and those of the texts that follow it a model has no place for; None: nothing."""
    prompt, *following = texts
    rows, positions = limits.vocabulary, limits.positions
    if rows is not None:
        for token in (token for text in texts for token in text if token >= rows):
            return (
                f"the token {tokenizer.convert_ids_to_tokens(int(token))!r} (id {token}) has no embedding in the model, which "
                f"has {rows}: use the model's own tokenizer, or resize its embeddings"
            )
    longest = len(prompt) + max((len(text) for text in following), default=0)
    if positions is not None and longest > positions:
        return f"it has more tokens than the model has positions, {positions}: lower max_length, or shorten it"
    return None


def _where(group: Group) -> str:
    return f"{group.origin or 'group'}: group {group.id!r}: "


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token that the tokenizer puts before plain text, if it puts one."""
    ids = tokenizer("a")["input_ids"]
    return int(ids[0]) if ids and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None

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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ncalign.core.errors import names
from ncalign.data.groups import Candidate, Group
from ncalign.model.chat import ChatTemplate, RefusedError, Turn, answered, as_messages, resolve_string_prompts
from ncalign.model.config import ControlTokensInText, EncodingConfig, StringPrompts
from ncalign.model.control_tokens import ControlTokens, control_notice
from ncalign.model.limits import Limits
from ncalign.model.untold import answers_keys, left_out, untold_notices

Ids = NDArray[np.int32]
Texts = TypeVar("Texts")
_NO_LIMITS = Limits()


@dataclass(frozen=True)
class EncodedGroup:
    """A group as token ids: what training needs of it."""

    id: str
    origin: str
    prompt: Ids
    completions: tuple[Ids, ...]
    rewards: tuple[float | None, ...]
    reference_logprobs: tuple[float | None, ...]
    weights: tuple[float, ...] = ()
    """Factor of the group's loss when this candidate is its positive; empty where every factor is 1."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(len(completion) for completion in self.completions)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and all completions."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


@dataclass
class EncodingReport:
    """Counts of what encoding did.

    Attributes:
        groups: groups encoded.
        candidates: candidates encoded.
        tokens: prompt and completion tokens of all candidates.
        scored_tokens: completion tokens.
        longest: tokens of the longest prompt and completion, after truncation.
        prompts_truncated: prompts that lost their beginning.
        completions_truncated: completions that lost their end, and their EOS with it.
        boundary_merges: candidates whose first token would have merged with the prompt's last.
        repeated_eos: candidates whose text ended with an EOS of its own; it is scored once.
        template_mismatches: candidates whose rendering is not the rendered prompt followed by the turn's header and their text
            (a template that rewrites the last turn); they are encoded as plain text after the prompt.
        dropped: dropped groups by reason.
        control_prompts: prompts in whose texts control tokens are written out.
        control_completions: completions with such texts.
        control_escaped: those of both whose control tokens were encoded as text.
        control_tokens: how many texts hold each.
        first_truncated: the first truncated group, to look at.
        untold: groups by what the chat template leaves out of their messages.
    """

    groups: int = 0
    candidates: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    longest: int = 0
    prompts_truncated: int = 0
    completions_truncated: int = 0
    boundary_merges: int = 0
    repeated_eos: int = 0
    template_mismatches: int = 0
    control_prompts: int = 0
    control_completions: int = 0
    control_escaped: int = 0
    control_tokens: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_truncated: str | None = None
    untold: Counter[str] = field(default_factory=Counter)

    def add(self, other: EncodingReport) -> None:
        """Count what another encoder did as well."""
        for entry in fields(self):
            if entry.type == "int":
                combine = max if entry.name == "longest" else sum
                setattr(self, entry.name, combine((getattr(self, entry.name), getattr(other, entry.name))))
        self.dropped.update(other.dropped)
        self.untold.update(other.untold)
        self.control_tokens.update(other.control_tokens)
        self.first_truncated = self.first_truncated or other.first_truncated

    def notices(self) -> list[str]:
        """What a user should know, one sentence each."""
        found = []
        if self.prompts_truncated or self.completions_truncated:
            found.append(
                f"{self.prompts_truncated} prompts lost their beginning and {self.completions_truncated} completions their end "
                f"(first: {self.first_truncated}); raise max_length to keep them whole"
            )
        if self.boundary_merges:
            found.append(
                f"{self.boundary_merges} completions would merge a token with their prompt; they are encoded after the "
                "prompt's own tokens, as in generation (end prompts without trailing spaces to avoid this)"
            )
        if self.repeated_eos:
            found.append(f"{self.repeated_eos} completions ended with an EOS of their own; it is scored once")
        if self.template_mismatches:
            found.append(
                f"the chat template renders {self.template_mismatches} completions differently from a generated turn; they are "
                "encoded as plain text after the prompt"
            )
        return [*found, *self.text_notices()]

    def text_notices(self) -> list[str]:
        """What is special about the texts themselves."""
        control = control_notice(self.control_prompts, self.control_completions, self.control_escaped, self.control_tokens)
        return [*untold_notices(self.untold), *([] if control is None else [control])]


class DroppedGroupError(ValueError):
    """A group that can't be encoded; ``reason`` is the short form that is counted."""

    def __init__(self, group: Group, reason: str, detail: str) -> None:
        """Name the group and say why."""
        super().__init__(f"{group.origin or 'group'}: group {group.id!r}: {detail}")
        self.reason = reason


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

    Raises:
        ValueError: ``max_prompt_length`` leaves completions no room.
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
        self._template, self._limits = ChatTemplate(tokenizer, today), limits
        self._control, self._control_as = ControlTokens(tokenizer), control_tokens

    def encode(self, group: Group) -> EncodedGroup:
        """Encode a group.

        Raises:
            DroppedGroupError: a completion is empty, has several turns or an EOS inside, or the group needs a chat template and
                there is none, or it refuses the group, or the model has no place for a token; the group is counted as dropped.
        """
        try:
            prompt, completions = self._truncate(group, *self._tokens(group))
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
        )
        self.report.untold.update(self.left_out(group))
        scored = sum(len(completion) for completion in completions)
        self.report.groups += 1
        self.report.candidates += len(completions)
        self.report.scored_tokens += scored
        self.report.tokens += scored + len(prompt) * len(completions)
        self.report.longest = max(self.report.longest, encoded.length)
        return encoded

    def left_out(self, group: Group) -> list[str]:
        """What the group holds beside roles and texts, and its tokens don't."""
        told = left_out(self._template, group.prompt, group.tools, self.string_prompts)
        return [*answers_keys([candidate.completion for candidate in group.candidates]), *told]

    def _tokens(self, group: Group) -> tuple[list[int], list[list[int]]]:
        as_chat = not isinstance(group.prompt, str) or self.string_prompts == "user_turn"
        if as_chat:
            turn, bodies = self._chat_bodies(group)
            prompt_text, end_id = turn.prompt, self._template.end_id(turn)
        else:
            assert isinstance(group.prompt, str)
            prompt_text, end_id = group.prompt, int(self.tokenizer.eos_token_id)
            bodies = [prompt_text + self._content(candidate, group, end_id) for candidate in group.candidates]
        prompt, *whole = self._control.encode([prompt_text, *bodies])
        completions = [
            self._split(group, prompt, body[len(prompt_text) :], ids, end_id) for body, ids in zip(bodies, whole, strict=True)
        ]
        completions = [
            tokens if candidate.finished else tokens[:-1]
            for candidate, tokens in zip(group.candidates, completions, strict=True)
        ]
        if not as_chat and self._bos is not None and prompt[:1] != [self._bos]:
            prompt = [self._bos, *prompt]
        if not prompt:
            raise DroppedGroupError(group, "empty prompt", "the prompt has no tokens: a completion needs something before it")
        return prompt, completions

    def _chat_bodies(self, group: Group) -> tuple[Turn, list[str]]:
        """The turn of the group's answers, and each candidate's whole text up to its end token."""
        bodies = []
        messages, tools = self._treated((as_messages(group.prompt), group.tools), group, what="prompt")
        try:
            turn = self._template.turn(messages, tools=tools)
            for candidate in group.candidates:
                text = self._content(candidate, group, self._template.end_id(turn))
                whole = answered(messages, text)
                full = self._template.render(whole, tools=tools, what="the prompt with its completion")
                bodies.append(self._body(turn, text, full) + turn.before_end)
        except RefusedError as error:
            raise DroppedGroupError(group, str(error), str(error)) from error
        return turn, bodies

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
        text = completion_text(candidate, group)
        if isinstance(candidate.completion, list) and candidate.completion[0].get("tool_calls"):
            raise DroppedGroupError(group, "tool calls in a completion", _CALLS)
        ends = tuple(self.tokenizer.convert_ids_to_tokens([end_id, int(self.tokenizer.eos_token_id)]))
        content = text
        while content.rstrip().endswith(ends):
            stripped = content.rstrip()
            content = stripped[: -max(len(end) for end in ends if stripped.endswith(end))]
        self.report.repeated_eos += content != text
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
            raise DroppedGroupError(
                group,
                "EOS inside a completion",
                "a completion has an end token in its middle: remove it, or cut the text there",
            )
        return [*completion, end_id]

    def _truncate(self, group: Group, prompt: list[int], completions: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        longest = max(len(completion) for completion in completions)
        if len(prompt) + longest <= self.max_length:
            return prompt, completions
        kept = min(len(prompt), max(self.max_prompt_length, self.max_length - longest))
        room = self.max_length - kept
        self.report.prompts_truncated += kept < len(prompt)
        self.report.completions_truncated += sum(len(completion) > room for completion in completions)
        self.report.first_truncated = self.report.first_truncated or _where(group).removesuffix(": ")
        # Models lean on BOS: what is cut off stands after it.
        first = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        return [*first, *prompt[len(prompt) - kept + len(first) :]], [completion[:room] for completion in completions]


_EMPTY = "a completion is empty: there is nothing to score"
_CALLS = "a completion has `tool_calls`: write the call into its text, as the model does, or leave the group out"


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
    )


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


def completion_text(candidate: Candidate, group: Group) -> str:
    """The text of a completion, which is a string or one assistant message."""
    completion = candidate.completion
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and completion[0]["role"] == "assistant":
        return str(completion[0]["content"])
    roles = ", ".join(message["role"] for message in completion)
    raise DroppedGroupError(
        group,
        "a completion of several turns" if len(completion) > 1 else "a completion that is no assistant's turn",
        f"a completion has the turns [{roles}]; it must be one assistant message: move earlier turns into the prompt",
    )


def _where(group: Group) -> str:
    return f"{group.origin or 'group'}: group {group.id!r}: "


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token that the tokenizer puts before plain text, if it puts one."""
    ids = tokenizer("a")["input_ids"]
    return int(ids[0]) if ids and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None

"""Prompts with scored candidate completions, as they are before they become tokens."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ncalign.core.errors import DataError, names, nearest, shown

Message: TypeAlias = dict[str, Any]
"""One turn of a conversation: ``{"role": ..., "content": ...}``, as chat templates take it; it may have more keys."""

Text: TypeAlias = str | list[Message]
"""A prompt or a completion: plain text, or turns of a conversation."""

JSON: TypeAlias = Any
"""A value that JSON can hold: null, true/false, a finite number, a string, a list or an object of these."""

STRING_PROMPTS = "string_prompts"
"""Key of a group's metadata that says how its string prompt was put to the model that wrote its candidates."""

TOOLS = "tools"
"""Key of a group's metadata that lists the tools which its chat template is given."""

Tools: TypeAlias = list[Any] | None
"""What a model may call, as chat templates take it; None for nothing."""

TEMPLATE_KWARGS = "chat_template_kwargs"
"""Key of a group's metadata that holds further values for its chat template, such as ``enable_thinking``; TRL's name."""

TemplateKwargs: TypeAlias = Mapping[str, Any]
"""Further values for a chat template, by their names."""

MESSAGE_KEYS = ("role", "content")
MORE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""What many messages have besides, for their chat template: all texts, but for the calls."""
MAX_DEPTH = 100
MAX_INT_BITS = 1024
MAX_NUMBER = 1e15
"""Larger rewards are refused: their differences and squares would overflow."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion of a prompt.

    Args:
        completion: Text or turns; may be empty (encoding drops what it can't use and counts it).
        reward: The outside score; None when there is none.
        reference_logprob: Log-probability of the completion under the reference, summed over its tokens, in nats.
        source: Where the completion came from, for instance a model's name.
        finished: False for a completion that was cut while it was generated; no EOS is scored after it.

    Raises:
        ValueError: A field has the wrong type, or a number is NaN or infinite.

    >>> Candidate("Four.", reward=1)
    Candidate(completion='Four.', reward=1.0, reference_logprob=None, source=None, finished=True)
    """

    completion: Text
    reward: float | None = None
    reference_logprob: float | None = None
    source: str | None = None
    finished: bool = True

    def __post_init__(self) -> None:
        """Validate, and turn whole numbers into floats."""
        check_text(self.completion, "completion")
        object.__setattr__(self, "reward", number_or_none(self.reward, "reward"))
        object.__setattr__(self, "reference_logprob", number_or_none(self.reference_logprob, "reference_logprob"))
        if self.source is not None:
            _check_string(self.source, "source")
        if type(self.finished) is not bool:
            raise DataError(f"finished is {shown(self.finished)}: true or false is needed", reason="wrong type")


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its candidates; the number of candidates may differ from group to group.

    Args:
        id: Names the group within its file.
        prompt: Text or turns, not empty.
        candidates: The completions; an empty list for a prompt that has none yet.
        metadata: Whatever else is known, as JSON values.
        origin: File and line or row the group was read from, for messages; neither stored nor compared.

    Raises:
        ValueError: A field has the wrong type or is empty where it must not be.

    >>> group = Group(id="sum", prompt="2 + 2 = ", candidates=[Candidate("4", reward=1.0), Candidate("5", reward=0.0)])
    >>> len(group.candidates)
    2
    """

    id: str
    prompt: Text
    candidates: list[Candidate]
    metadata: dict[str, JSON] = field(default_factory=dict)
    origin: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Validate."""
        _check_string(self.id, "id")
        if not self.id:
            raise DataError("id is empty: a name is needed", reason="empty id")
        check_text(self.prompt, "prompt")
        if isinstance(self.prompt, str) and not self.prompt:
            raise DataError("prompt is empty: text or a list of messages is needed", reason="empty prompt")
        if not isinstance(self.candidates, list):
            raise DataError(f"candidates is {shown(self.candidates)}: a list is needed", reason="wrong type")
        for index, candidate in enumerate(self.candidates):
            if not isinstance(candidate, Candidate):
                raise DataError(f"candidates[{index}] is {shown(candidate)}: a Candidate is needed", reason="wrong type")
        if not isinstance(self.metadata, dict):
            raise DataError(f"metadata is {shown(self.metadata)}: an object is needed", reason="wrong type")
        check_json(self.metadata, "metadata")

    @property
    def tools(self) -> Tools:
        """What a model that is shown the prompt may call."""
        return self.metadata.get(TOOLS) or None

    @property
    def template_kwargs(self) -> TemplateKwargs:
        """Further values for the chat template that writes the prompt and its completions."""
        return self.metadata.get(TEMPLATE_KWARGS) or {}


def check_text(value: object, where: str) -> None:
    """Raise unless the value is a string or a list, not empty, of ``{role, content}`` messages."""
    if isinstance(value, str):
        _check_encodable(value, where)
        return
    if not isinstance(value, list):
        raise DataError(f"{where} is {shown(value)}: a string or a list of messages is needed", reason="wrong type")
    if not value:
        raise DataError(f"{where} is an empty list: at least one {{role, content}} message is needed", reason="empty list")
    for index, message in enumerate(value):
        _check_message(message, f"{where}[{index}]")


def number_or_none(value: object, where: str) -> float | None:
    """Return a finite float, or None for None.

    Raises:
        ValueError: Not a number, or NaN, infinite or beyond ``MAX_NUMBER``.
    """
    if value is None or (type(value) is float and abs(value) <= MAX_NUMBER):
        return value
    # bool is a number to Python, but true as a reward is a mistake.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DataError(f"{where} is {shown(value)}: a number is needed, or null when it is missing", reason="wrong type")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        found = "NaN" if math.isnan(number) else "infinite, or too large for a float"
        raise DataError(f"{where} is {found}: a finite number is needed; use null for a missing {where}", reason="not finite")
    if abs(number) > MAX_NUMBER:
        raise DataError(
            f"{where} is {number:g}: a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g} is needed", reason="out of range"
        )
    return number


def check_json(value: object, where: str, depth: int = 0) -> None:
    """Raise unless the value can be written as JSON and read back the same."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        _check_encodable(value, where)
    elif isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise DataError(f"{where} is a number {shown(value)}: too large to store", reason="not finite")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{where} is {value}: JSON has no such number; use null", reason="not finite")
    elif depth >= MAX_DEPTH:
        raise DataError(f"{where[:60]}... is nested more than {MAX_DEPTH} levels deep", reason="nested too deep")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_string(key, f"a key of {where}")
            check_json(item, f"{where}.{key}", depth + 1)
    else:
        raise DataError(f"{where} is {shown(value)}: JSON has no such type; drop it or make it a string", reason="wrong type")


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {shown(message)}: a {{role, content}} message is needed", reason="wrong type")
    if message.keys() != {"role", "content"}:
        known = (*MESSAGE_KEYS, *MORE_KEYS)
        absent = [key for key in known if key not in message]
        for key in message:
            if key not in known and nearest(key, absent, cutoff=0.82):
                raise unknown_key(key, absent, where)
        if lacking := [key for key in MESSAGE_KEYS if key not in message]:
            raise DataError(f"{where} lacks {names(lacking)}: `role` and `content` are needed", reason="missing key")
        _check_more(message, where)
    _check_string(message["role"], f"{where}.role")
    _check_string(message["content"], f"{where}.content")
    if not message["role"]:
        raise DataError(f"{where}.role is empty: for instance `user` or `assistant` is needed", reason="empty role")


def _check_more(message: Message, where: str) -> None:
    for key in message:
        if key in MESSAGE_KEYS:
            continue
        if key not in MORE_KEYS:
            _check_string(key, f"a key of {where}")
            check_json(message[key], f"{where}.{key}")
        elif key != "tool_calls":
            _check_string(message[key], f"{where}.{key}")
        elif not isinstance(message[key], list) or not all(isinstance(call, dict) for call in message[key]):
            raise DataError(f"{where}.{key} is {shown(message[key])}: a list of objects is needed", reason="wrong type")
        else:
            check_json(message[key], f"{where}.{key}")


def unknown_key(key: object, known: list[str] | tuple[str, ...], where: str) -> DataError:
    """Return the error for a key that nothing reads, with the nearest right name or the list of right ones."""
    guess = nearest(key, known)
    hint = f"did you mean `{guess}`?" if guess else f"known keys: {names(known)}"
    return DataError(f"{where} has an unknown key {names([key])}: {hint}", reason="unknown key")


def _check_string(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} is {shown(value)}: a string is needed", reason="wrong type")
    _check_encodable(value, where)


def _check_encodable(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair at character {error.start}: no text encoding can hold it; "
            "replace the character",
            reason="bad text",
        ) from None

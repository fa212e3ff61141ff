"""Control tokens that are written out in the texts of data: found, and encoded as text where that is wanted.

A tokenizer reads `<|im_end|>` as the token that ends a turn, whether the chat template or a text wrote it. To tell the two
apart, a name that no text holds stands in for each that a text holds, until the template has written its own; then the
template's are renamed, and a copy of the tokenizer that knows its control tokens by those names alone encodes the whole.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ncalign.core.errors import names as shown

Value = TypeVar("Value")

# Private-use characters; a text can't hold the random part.
_SECRET = secrets.token_hex(8)
_STANDS_IN, _RENAMED = f"\ue000{_SECRET}t", f"\ue000{_SECRET}c"
_END = "\ue001"


class ControlTokens:
    """The control tokens of a tokenizer: those that it marks as special.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longer ones first: one may begin as another does.
        self.names = sorted(
            (name for name in {*tokenizer.all_special_tokens, *added} if name.strip()), key=lambda n: (-len(n), n)
        )
        self._places = {name: place for place, name in enumerate(self.names)}
        self._written = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        self._stand_in = re.compile(f"{_STANDS_IN}(\\d+){_END}")

    def found(self, value: object) -> set[str]:
        """The control tokens that a text, or the texts in a list or an object, are written with."""
        if isinstance(value, str):
            return set(self._written.findall(value))
        if isinstance(value, dict):
            return set().union(*(self.found(part) for pair in value.items() for part in pair))
        return set().union(*map(self.found, value)) if isinstance(value, list | tuple) else set()

    def stood_in(self, value: Value) -> Value:
        """The same with a name in the place of each control token, for a chat template to write."""
        changed: Any = value
        if isinstance(value, str):
            changed = self._written.sub(lambda found: f"{_STANDS_IN}{self._places[found[0]]}{_END}", value)
        elif isinstance(value, dict):
            changed = {self.stood_in(name): self.stood_in(part) for name, part in value.items()}
        elif isinstance(value, list | tuple):
            changed = [self.stood_in(part) for part in value]
        return changed  # type: ignore[no-any-return]

    def as_written(self, text: str) -> str:
        """A text with the control tokens that :meth:`stood_in` replaced."""
        return self._stand_in.sub(lambda found: self.names[int(found[1])], text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts, in which names may stand for control tokens that are text; all others are what they are.

        Raises:
            ValueError: it is no tokenizer of the library `tokenizers`, or can't be copied with other names.
        """
        if not any(_STANDS_IN in text for text in texts):
            plain = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return [list(ids) for ids in plain]
        renamed = [self._written.sub(lambda found: f"{_RENAMED}{self._places[found[0]]}{_END}", text) for text in texts]
        encoded = self._copy.encode_batch(list(map(self.as_written, renamed)), add_special_tokens=False)
        return [list(one.ids) for one in encoded]

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokens of a text as :meth:`encode` has them, and which of them lie in these parts of it, be it with a letter.

        Raises:
            ValueError: as :meth:`encode`; or the tokenizer does not say where its tokens stand, and joins those of two parts.
        """
        if _STANDS_IN in text:
            written, spans = self._renamed(text, spans)
            one = self._copy.encode(written, add_special_tokens=False)
            return list(one.ids), _inside(one.offsets, spans)
        if not self._tokenizer.is_fast:
            return self._by_beginnings(text, spans)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), _inside(found["offset_mapping"], spans)

    def _renamed(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """A text as the copy of the tokenizer reads it, and where its parts stand there."""
        pieces: list[str] = []
        starts, moved = [0], [0]
        at = 0
        for found in re.finditer(f"{self._stand_in.pattern}|{self._written.pattern}", text):
            own = found[1]
            piece = f"{_RENAMED}{self._places[found[0]]}{_END}" if own is None else self.names[int(own)]
            pieces += [text[at : found.start()], piece]
            at = found.end()
            starts.append(at)
            moved.append(moved[-1] + len(piece) - (found.end() - found.start()))
        pieces.append(text[at:])

        def place(index: int) -> int:
            return index + moved[bisect_right(starts, index) - 1]

        return "".join(pieces), [(place(start), place(end)) for start, end in spans]

    def _by_beginnings(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The same with a tokenizer that does not say where its tokens stand: by the tokens of the text's beginnings."""
        (ids,) = self.encode([text])
        inside = [False] * len(ids)
        for start, end in spans:
            first, last = self.encode([text[:start], text[:end]])
            if ids[: len(first)] != first or ids[: len(last)] != last:
                raise ValueError("the tokenizer does not say where its tokens stand, and joins what is scored with what is not")
            inside[len(first) : len(last)] = [True] * (len(last) - len(first))
        return ids, inside

    @cached_property
    def _copy(self) -> Tokenizer:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "control_tokens_in_text: escape needs a tokenizer with a tokenizer.json; keep or refuse go without"
            )
        described = json.loads(backend.to_str())
        names = {name: f"{_RENAMED}{place}{_END}" for name, place in self._places.items()}
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = described["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(name, name): number for name, number in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        copy = Tokenizer.from_str(json.dumps(described | {"truncation": None, "padding": None}))
        for name, other in names.items():
            if copy.token_to_id(other) != backend.token_to_id(name):
                raise ValueError(f"control_tokens_in_text: escape can't be had: the tokenizer needs {name!r} by its name")
        return copy


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens, by where they begin and end, have a letter in one of the parts; an empty one lies where it begins.

    >>> _inside([(0, 2), (2, 2), (2, 5), (5, 6)], [(1, 3)])
    [True, True, True, False]
    """
    begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (np.maximum(ends, begins + 1) > start) & (begins < end)
    return [bool(one) for one in inside]


def control_notice(prompts: int, completions: int, escaped: int, tokens: Mapping[str, int]) -> str | None:
    """What a user should know of texts in which control tokens are written out; None where there are none.

    Args:
        prompts: with such texts.
        completions: with such texts.
        escaped: those of both whose control tokens were encoded as text.
        tokens: how many texts hold each control token.
    """
    if not tokens:
        return None
    counted = [f"{number} {what}" for number, what in ((completions, "completions"), (prompts, "prompts")) if number]
    read = "they are encoded as text" if escaped else "the model reads them as its own (control_tokens_in_text)"
    common = sorted(tokens, key=lambda name: (-tokens[name], name))
    return f"control tokens are written out in {' and '.join(counted)} ({shown(common, limit=5)}): {read}"

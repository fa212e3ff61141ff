"""Rewards from a Hugging Face sequence-classification reward model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from transformers import PreTrainedTokenizerBase

from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.formats.group import MAX_NUMBER, TOOLS, Text
from ncalign.data.groups import Group
from ncalign.data.rendering import completion_text, message_text
from ncalign.model.chat import ChatTemplate, RefusedError, answered, as_messages
from ncalign.model.config import Precision
from ncalign.model.control_tokens import ControlTokens
from ncalign.model.conversations import is_plain, joined
from ncalign.model.encoding import DroppedGroupError, beyond, check_limits
from ncalign.model.limits import limits_of
from ncalign.model.policy import DTYPES, load_model, load_tokenizer, reading_fingerprint, weights_fingerprint
from ncalign.model.untold import left_out, left_out_of_answers
from ncalign.rewards.base import completion_texts

_REWARD = TypeAdapter(Annotated[float, Field(strict=True, ge=-MAX_NUMBER, le=MAX_NUMBER)])


class ModelReward:
    """Scores with the single logit of a reward model, in batches of like length.

    The conversation goes through the reward model's own chat template; a model without one sees prompt and completion as a
    pair of texts.

    Args:
        model: folder or hub id of a sequence-classification model with one label, or a folder with an adapter for one.
        dtype: precision of weights and computation.
        batch_size: completions at a time.
        store: keeps scores by model and text.
        trust_remote_code: run code that comes with the model.
        today: the date for a chat template that writes it; None for that of the call.

    Raises:
        ValueError: the model can't be loaded, has another number of labels than one, or no embedding for its padding token.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: Precision = "float32",
        batch_size: int = 16,
        store: Store | None = None,
        trust_remote_code: bool = False,
        today: date | None = None,
    ) -> None:
        self._name, self._batch_size, self._store = model, batch_size, store
        self._said: set[str] = set()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = load_model(
            model, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, task="SEQ_CLS", what="reward model"
        )
        if loaded.config.num_labels != 1:
            raise ValueError(f"reward model {model!r} has {loaded.config.num_labels} labels: a reward is one number, one label")
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(model, trust_remote_code=trust_remote_code)
        loaded.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = torch.nn.Module.to(loaded, device).eval()
        self._device = device
        self._identity = weights_fingerprint(loaded, computation=str(loaded.dtype)) if store is not None else ""
        self._template, self._limits = ChatTemplate(self._tokenizer, today), limits_of(loaded)
        self._control = ControlTokens(self._tokenizer)
        if problem := beyond([[int(self._tokenizer.pad_token_id)]], self._tokenizer, self._limits):
            raise ValueError(f"reward model {model!r}: {problem}")

    def fingerprint(self) -> str:
        """A digest of all that scores depend on: weights, precision, tokenizer and chat template."""
        weights = self._identity or weights_fingerprint(self._model, computation=str(self._model.dtype))
        return Store.key(weights, reading_fingerprint(self._model, self._tokenizer))

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Score several groups, in batches across them; None where the logit is no number, or beyond any reward's bound.

        Raises:
            DroppedGroupError: the model's chat template refuses a group, or the model has no embedding for a token.
        """
        for group in groups:
            self._say_what_is_left_out(group)
            self._say_what_is_no_text(group)
        encoded = [self._encode(group, candidate.completion) for group in groups for candidate in group.candidates]
        keys = [Store.key("reward model", self._identity, ids) for ids in encoded]
        found: list[float | None] = [None if self._store is None else self._store.get_as(key, _REWARD) for key in keys]
        # Equal texts are one row: in rows of different batches their scores could differ by rounding.
        first = {key: index for index, key in reversed([*enumerate(keys)]) if found[index] is None}
        open_ = sorted(first.values(), key=lambda index: (-len(encoded[index]), index))
        new: dict[str, float | None] = {}
        for start in range(0, len(open_), self._batch_size):
            batch = open_[start : start + self._batch_size]
            for index, value in zip(batch, self._logits([encoded[index] for index in batch]), strict=True):
                usable = abs(value) <= MAX_NUMBER  # also false of NaN
                new[keys[index]] = value if usable else None
                if self._store is not None and usable:
                    self._store.put(keys[index], value)
        found = [new.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]
        rewards = iter(found)
        return [[next(rewards) for _ in group.candidates] for group in groups]

    def _say_what_is_no_text(self, group: Group) -> None:
        """Say, once of each, which control tokens texts are written with: a completion could end its turn and go on."""
        for name in sorted(self._control.found([group.prompt, *completion_texts(group)]) - self._said):
            self._said.add(name)
            say(f"note: the control token `{name}` is written out in texts: the reward model reads it as its own")

    def _say_what_is_left_out(self, group: Group) -> None:
        """Say, once of each, what a group holds beside roles and texts and the model does not see."""
        found = [TOOLS] if group.tools else []
        if self._tokenizer.chat_template is not None:
            found = left_out(self._template, group.prompt, "user_turn", tools=group.tools)
            for completion in (one.completion for one in group.candidates if isinstance(one.completion, list)):
                found += left_out_of_answers(self._template, as_messages(group.prompt), completion, tools=group.tools)
        for name in found:
            if name not in self._said:
                self._said.add(name)
                where = "" if name.endswith(" of answers") else " of prompts"
                say(f"note: reward model {self._name!r} does not see `{name}`{where} (first: group {group.id!r})")

    def _encode(self, group: Group, completion: Text) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer.chat_template is not None:
            messages = as_messages(group.prompt)
            try:
                if isinstance(completion, str) or is_plain(completion):
                    messages = answered(messages, completion_text(completion))
                else:
                    messages, _ = joined(messages, completion)
                rendered = self._template.render(messages, tools=group.tools, what="it")
            except RefusedError as error:
                problem = f"reward model: {error}"
                raise DroppedGroupError(group, problem, problem) from error
            ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            prompt = "\n\n".join(map(message_text, as_messages(group.prompt)))
            ids = tokenizer(prompt, completion_text(completion), verbose=False)["input_ids"]
        # The answer stands at the end, and is what is scored.
        limit = self._limits.context if self._limits.positions is None else self._limits.positions
        kept = list(ids if limit is None else ids[-limit:])
        check_limits(group, [kept], tokenizer, self._limits)
        return kept

    @torch.inference_mode()
    def _logits(self, batch: Sequence[list[int]]) -> list[float]:
        width, filler = max(len(ids) for ids in batch), int(self._tokenizer.pad_token_id)
        # Padding at the right: causal reward models read the last token that is not padding.
        ids = torch.tensor([row + [filler] * (width - len(row)) for row in batch], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self._device)
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        values: list[float] = logits[:, 0].float().tolist()
        return values

"""`ncalign check`: every group encoded as training will, and a list of what to mend before a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedTokenizerBase

from ncalign.audit.config import CheckConfig
from ncalign.audit.measures import prompt_key, words
from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar
from ncalign.data.formats.seen import Seen, digest
from ncalign.data.groups import Group, ReadReport, read_groups
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder, EncodingReport, as_messages, completion_text
from ncalign.model.policy import load_tokenizer, quiet_transformers
from ncalign.training.dry_run import token_layout

_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_EXAMPLES, _SHOWN = 2, 48
RUN_WORDS = 13
"""Words in the same order that a prompt shares with one of the evaluation set, for it to count as known."""


@dataclass(frozen=True)
class Marks:
    """What a tokenizer and its chat template mark beginnings and ends with.

    Attributes:
        bos: the BOS token; None where there is none, or where it ends turns too.
        opens_turns: whether the template begins each turn with it, as some ChatML models do: then two in a row are one too
            many, and others are not.
        ends: tokens that may end a turn: EOS, and what chat templates use for it.
    """

    bos: int | None
    opens_turns: bool
    ends: NDArray[np.int64]

    def count_bos(self, prompt: NDArray[np.int32], completion: NDArray[np.int32]) -> int:
        """BOS tokens of a prompt and its completion."""
        if self.bos is None:
            return 0
        if self.opens_turns:
            at = np.flatnonzero(np.concatenate([prompt, completion]) == self.bos)
            return 1 + int((np.diff(at) == 1).sum()) if len(at) else 0
        return int((prompt == self.bos).sum() + (completion == self.bos).sum())


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks of a tokenizer and its template."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")
    known = tokenizer.get_vocab()
    ends = sorted({int(tokenizer.eos_token_id), *(known[name] for name in names if name in known)})
    bos = tokenizer.bos_token_id
    if bos is None or bos in ends:
        return Marks(None, False, np.asarray(ends))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False)) if tokenizer.chat_template else ""
    except Exception:  # templates raise what they like; encoding says so of the groups that meet it
        rendered = ""
    return Marks(int(bos), rendered.count(str(tokenizer.bos_token)) >= len(turns), np.asarray(ends))


@dataclass
class Account:
    """What was counted in some groups.

    Attributes:
        groups: groups looked at.
        candidates: their candidates.
        without_reward: candidates without one.
        without_spread: groups in which no two rewards differ.
        copies: candidates whose text is an earlier one's of their group.
        near_copies: those that equal one but for case, punctuation and white space.
        first_copy: a group with such a candidate.
        bos: candidates by how many BOS tokens stand in their prompt and completion.
        eos: finished, uncut candidates by how many end tokens close them.
        first_dropped: a group that can't be encoded, for each reason.
        contaminated: groups whose prompt is, or shares a run of words with, one of the evaluation set.
        first_contaminated: such a group.
        lengths: candidates by their tokens: of the prompt, of the completion and of both together.
        examples: the first encoded groups.
    """

    groups: int = 0
    candidates: int = 0
    without_reward: int = 0
    without_spread: int = 0
    copies: int = 0
    near_copies: int = 0
    first_copy: str | None = None
    bos: Counter[int] = field(default_factory=Counter)
    eos: Counter[int] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    contaminated: int = 0
    first_contaminated: str | None = None
    lengths: tuple[Counter[int], Counter[int], Counter[int]] = field(default_factory=lambda: (Counter(), Counter(), Counter()))
    examples: list[EncodedGroup] = field(default_factory=list)

    def add(self, other: Account) -> None:
        """Count what another one counted as well."""
        for name in ("groups", "candidates", "without_reward", "without_spread", "copies", "near_copies", "contaminated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_copy = self.first_copy or other.first_copy
        self.first_dropped = other.first_dropped | self.first_dropped
        self.first_contaminated = self.first_contaminated or other.first_contaminated
        self.bos += other.bos
        self.eos += other.eos
        for mine, theirs in zip(self.lengths, other.lengths, strict=True):
            mine += theirs
        self.examples = (self.examples + other.examples)[:_EXAMPLES]


Digests = list[tuple[bytes, str]]
"""Of texts, with the places that they came from."""


class Repeats:
    """Texts that occur in several groups, whatever their number.

    Attributes:
        prompts: but for case, punctuation and white space.
        exact: completions as they are, once a group.
        near: completions but for case, punctuation and white space, once a group.
    """

    def __init__(self) -> None:
        self.prompts, self.exact, self.near = Seen(), Seen(), Seen()

    def add(self, found: tuple[Digests, Digests, Digests]) -> None:
        """Count those of some groups."""
        for seen, digests in zip((self.prompts, self.exact, self.near), found, strict=True):
            seen.add_digests(digests)

    def close(self) -> None:
        """Give the files back."""
        for seen in (self.prompts, self.exact, self.near):
            seen.close()


def run_check(config: CheckConfig) -> dict[str, Any]:
    """Look at every group of a file as training with this model would see it.

    Returns:
        The counts, ``ready``, ``mend`` (a list of what to mend), and all of it as printable text under ``text``.

    Raises:
        ValueError: the data or the tokenizer can't be read.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    encoder = Encoder(
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        string_prompts=config.string_prompts,
    )
    held_out = None if config.against is None else HeldOut(config.against)
    report, account = ReadReport(), Account()
    groups = read_groups(config.data, schema=config.schema_name, on_bad_row="skip", report=report)
    with closing(Repeats()) as repeats, Bar("Checking groups", None) as bar:
        for part, encoding, digests in map_chunks(
            partial(_look, encoder, marks_of(tokenizer), held_out), groups, workers=num_workers()
        ):
            encoder.report.add(encoding)
            account.add(part)
            repeats.add(digests)
            bar.advance(part.groups)
        if not account.groups:
            raise ValueError(
                f"{config.data} has no group to check: {report.summary()}" + "".join(f"\n  {e}" for e in report.examples)
            )
        mend = to_mend(account, encoder.report, report, config, context=_context(config))
        facts = _facts(account, encoder.report, report, repeats)
    return {**facts, "ready": not mend, "mend": mend, "text": _text(config, facts, mend, account, tokenizer)}


class HeldOut:
    """The prompts of an evaluation set.

    Args:
        path: its groups; candidates may be absent.

    Raises:
        ValueError: it can't be read, or is empty.
    """

    def __init__(self, path: str) -> None:
        texts = [words(prompt_words(group)) for group in read_groups(path, on_bad_row="skip", allow_empty=True)]
        if not texts:
            raise ValueError(f"against: {path} has no prompt")
        self._whole = {digest(" ".join(text)) for text in texts}
        self._runs = {run for text in texts for run in _runs(text)}

    def knows(self, prompt: Sequence[str]) -> bool:
        """Whether a prompt is one of them, but for case, punctuation and white space, or has 13 words in a row of one."""
        return digest(" ".join(prompt)) in self._whole or any(run in self._runs for run in _runs(prompt))


def _runs(text: Sequence[str]) -> Iterator[int]:
    # Hashes of strings hold for this process and those forked from it.
    return (hash(tuple(text[start : start + RUN_WORDS])) for start in range(len(text) - RUN_WORDS + 1))


def prompt_words(group: Group) -> str:
    """What of a prompt may be known from elsewhere: what the user says, without system messages and earlier answers."""
    return "\n".join(message["content"] for message in as_messages(group.prompt) if message["role"] == "user")


def _look(
    encoder: Encoder, marks: Marks, held_out: HeldOut | None, groups: Sequence[Group]
) -> tuple[Account, EncodingReport, tuple[Digests, Digests, Digests]]:
    """Encode some groups, with an account of their own."""
    encoder = copy(encoder)
    encoder.report = EncodingReport()
    account = Account()
    digests: tuple[Digests, Digests, Digests] = ([], [], [])
    for group in groups:
        account.groups += 1
        account.candidates += len(group.candidates)
        rewards = [candidate.reward for candidate in group.candidates if candidate.reward is not None]
        account.without_reward += len(group.candidates) - len(rewards)
        account.without_spread += len(set(rewards)) < 2
        digests[0].append((digest(prompt_key(group)), group.origin or group.id))
        if held_out is not None and held_out.knows(words(prompt_words(group))):
            account.contaminated += 1
            account.first_contaminated = account.first_contaminated or group.origin or group.id
        if not group.candidates:
            encoder.report.dropped["no candidates"] += 1
            account.first_dropped.setdefault("no candidates", group.origin or group.id)
            continue
        try:
            _count_copies(group, account, digests)
            encoded = encoder.encode(group)
        except DroppedGroupError as dropped:
            account.first_dropped.setdefault(dropped.reason, group.origin or group.id)
            continue
        except ValueError as error:
            # What training would stop at: a missing chat template, a conversation that does not fit it.
            reason = str(error).partition(": group ")[2].partition(": ")[2] or str(error)
            encoder.report.dropped[reason] += 1
            account.first_dropped.setdefault(reason, group.origin or group.id)
            continue
        _count_tokens(encoder, marks, group, encoded, account)
        if len(account.examples) < _EXAMPLES:
            account.examples.append(encoded)
    return account, encoder.report, digests


def _count_copies(group: Group, account: Account, digests: tuple[Digests, Digests, Digests]) -> None:
    """Count copies within a group, and keep one digest of each text for those across groups."""
    texts = [completion_text(candidate, group) for candidate in group.candidates]
    exact = set(texts)
    near = {" ".join(words(text)) or text for text in exact}
    copies, nearly = len(texts) - len(exact), len(exact) - len(near)
    account.copies += copies
    account.near_copies += nearly
    place = group.origin or group.id
    if copies or nearly:
        account.first_copy = account.first_copy or place
    digests[1].extend((digest(text), place) for text in exact)
    digests[2].extend((digest(text), place) for text in near)


def _count_tokens(encoder: Encoder, marks: Marks, group: Group, encoded: EncodedGroup, account: Account) -> None:
    for candidate, completion in zip(group.candidates, encoded.completions, strict=True):
        sizes = (len(encoded.prompt), len(completion), len(encoded.prompt) + len(completion))
        for counted, size in zip(account.lengths, sizes, strict=True):
            counted[size] += 1
        account.bos[marks.count_bos(encoded.prompt, completion)] += 1
        if candidate.finished and sizes[2] < encoder.max_length:
            account.eos[int(np.isin(completion, marks.ends).sum())] += 1


def _context(config: CheckConfig) -> int | None:
    """Positions that the model has; None where its configuration does not say."""
    try:
        with quiet_transformers(config.model):
            found = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError):
        return None
    return getattr(found.get_text_config(), "max_position_embeddings", None)


def to_mend(
    account: Account,
    encoding: EncodingReport,
    read: ReadReport,
    config: CheckConfig,
    *,
    context: int | None,
) -> list[str]:
    """What to mend, the worst first; nothing where the data are ready."""
    return list(_mend(account, encoding, read, config, context))


def _mend(
    account: Account, encoding: EncodingReport, read: ReadReport, config: CheckConfig, context: int | None
) -> Iterator[str]:
    if read.skipped:
        yield (
            f"{read.skipped} of {read.rows} rows can't be read (first: {read.examples[0]}): mend them, or train with "
            "on_bad_row: skip"
        )
    for reason, count in encoding.dropped.most_common():
        first = account.first_dropped.get(reason)
        where = f" (first: {first})" if first is not None else ""
        yield f"{count} groups can't be encoded: {reason}{where}; mend them, or on_bad_row: skip leaves them out of training"
    doubled = sum(count for number, count in account.bos.items() if number > 1)
    if doubled:
        yield (
            f"{doubled} candidates have more than one BOS token: prompts hold one as text, or template and tokenizer add one "
            "each"
        )
    wrong = sum(count for number, count in account.eos.items() if number != 1)
    if wrong:
        yield f"{wrong} candidates that are not cut don't end with exactly one end token: look at the chat template"
    if context is not None and config.max_length > context:
        yield f"max_length is {config.max_length} and the model has {context} positions: lower it"
    if encoding.completions_truncated:
        yield (
            f"{encoding.completions_truncated} completions lose their end at max_length {config.max_length} (first: "
            f"{encoding.first_truncated}; the longest whole candidate takes more): raise max_length, or shorten them"
        )
    if encoding.prompts_truncated:
        yield f"{encoding.prompts_truncated} prompts lose their beginning (first: {encoding.first_truncated}): raise max_length"
    if encoding.template_mismatches:
        yield (
            f"the chat template renders {encoding.template_mismatches} completions otherwise than a generated turn: mend the "
            "template"
        )
    if account.contaminated:
        yield (
            f"{account.contaminated} prompts are prompts of {config.against} too, or share {RUN_WORDS} words in a row with one "
            f"(first: {account.first_contaminated}): leave them out, or what is measured there is memory"
        )
    if account.copies:
        yield f"{account.copies} candidates are copies of another of their group (first: {account.first_copy}): leave them out"
    if account.without_spread == account.groups:
        yield "in no group do two rewards differ: there is nothing to learn"


def _quantiles(counts: Counter[int]) -> dict[str, int]:
    """Of counted whole numbers: the smallest that so large a share does not exceed."""
    sizes = sorted(counts) or [0]
    upto: NDArray[np.int64] = np.cumsum([counts[size] for size in sizes])
    return {f"{q:g}": sizes[min(int(np.searchsorted(upto, q * upto[-1])), len(sizes) - 1)] for q in _QUANTILES}


def _facts(account: Account, encoding: EncodingReport, read: ReadReport, repeats: Repeats) -> dict[str, Any]:
    return {
        "groups": account.groups,
        "candidates": account.candidates,
        "rows_skipped": read.skipped,
        "groups_dropped": dict(encoding.dropped),
        "groups_without_spread": account.without_spread,
        "candidates_without_reward": account.without_reward,
        "copies": account.copies,
        "near_copies": account.near_copies,
        "repeated_prompts": repeats.prompts.repeated(),
        "copies_across_groups": repeats.exact.repeated(),
        "near_copies_across_groups": repeats.near.repeated(),
        "contaminated_prompts": account.contaminated,
        "bos_tokens": {str(number): count for number, count in sorted(account.bos.items())},
        "end_tokens": {str(number): count for number, count in sorted(account.eos.items())},
        "boundary_merges": encoding.boundary_merges,
        "repeated_eos": encoding.repeated_eos,
        "template_mismatches": encoding.template_mismatches,
        "prompts_truncated": encoding.prompts_truncated,
        "completions_truncated": encoding.completions_truncated,
        "tokens": dict(zip(("prompt", "completion", "both"), map(_quantiles, account.lengths), strict=True)),
    }


def _text(
    config: CheckConfig,
    facts: dict[str, Any],
    mend: Sequence[str],
    account: Account,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    lines = [f"{config.data}: {facts['groups']} groups, {facts['candidates']} candidates"]
    for name, label in (("prompt", "prompt tokens"), ("completion", "completion tokens"), ("both", "together")):
        row = facts["tokens"][name]
        lines.append(f"  {label}: median {row['0.5']}, 90 % {row['0.9']}, 99 % {row['0.99']}, longest {row['1']}")
    for name in (
        "groups_without_spread",
        "candidates_without_reward",
        "copies",
        "near_copies",
        "copies_across_groups",
        "near_copies_across_groups",
        "repeated_prompts",
        "boundary_merges",
        "repeated_eos",
    ):
        lines.append(f"  {name.replace('_', ' ')}: {facts[name]}")
    lines.append(f"  BOS tokens of a candidate: {_counts(facts['bos_tokens'])}; end tokens: {_counts(facts['end_tokens'])}")
    for group in account.examples:
        lines += ["", f"Group {group.id!r}, scored tokens in [brackets]:", token_layout(group, tokenizer, most=_SHOWN)]
    lines.append("")
    if mend:
        lines += ["To mend:", *(f"  {number}. {text}" for number, text in enumerate(mend, start=1))]
    else:
        lines.append("ready")
    return "\n".join(lines)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{number} in {count}" for number, count in found.items()) or "none"

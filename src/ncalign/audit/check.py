"""`ncalign check`: every group encoded as training would, and a list of what must be fixed before a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ncalign.audit.config import CheckConfig
from ncalign.audit.texts import prompt_key, prompt_words, runs, words
from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar
from ncalign.data.formats.seen import Seen, digest
from ncalign.data.groups import Group, ReadReport, read_groups
from ncalign.data.rendering import Rendering, completion_text, recorded_renderings, rendering_warning
from ncalign.model.chat import ChatTemplate, RefusedError
from ncalign.model.conversations import is_plain
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder, EncodingReport, make_encoder
from ncalign.model.limits import limits_of_folder
from ncalign.model.policy import load_tokenizer
from ncalign.training.plan import token_layout

_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_EXAMPLES, _SHOWN_TOKENS = 2, 48
_LISTED = 20
"""Bad rows and groups whose places are listed, of each kind."""
_LENGTHS = {"prompt": "prompt tokens", "completion": "completion tokens", "both": "together"}
_ACROSS = ("repeated_prompts", "copies_across_groups", "near_copies_across_groups")
_ENCODING_COUNTS = ("boundary_merges", "repeated_eos", "template_mismatches", "prompts_truncated", "completions_truncated")
_COUNTS = ("groups_without_spread", "candidates_without_reward", "copies", "near_copies")
_SHOWN_COUNTS = (*_COUNTS, *_ACROSS[1:], *_ACROSS[:1], *_ENCODING_COUNTS[:2])
RUN_WORDS = 13
"""A prompt is contaminated if it shares this many words in a row with one of the evaluation set, or is the same."""


@dataclass(frozen=True)
class Marks:
    """The tokens with which a tokenizer and its chat template mark where texts and turns begin and end.

    Attributes:
        bos: the BOS token; None where there is none, or where it ends turns too.
        opens_turns: whether the template begins each turn with it, as some ChatML models do: then only two in a row are one too
            many.
        ends: tokens that may end a turn: EOS, that of the tokenizer's own chat template, and those of common ones.
    """

    bos: int | None
    opens_turns: bool
    ends: NDArray[np.int64]

    def count_bos(self, prompt: NDArray[np.int32], completion: NDArray[np.int32]) -> int:
        """How many BOS tokens open a prompt with its completion; those that open further turns are left out."""
        if self.bos is None:
            return 0
        if self.opens_turns:
            at = np.flatnonzero(np.concatenate([prompt, completion]) == self.bos)
            return 1 + int((np.diff(at) == 1).sum()) if len(at) else 0
        return int((prompt == self.bos).sum() + (completion == self.bos).sum())


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that a tokenizer and its template use."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")
    known = tokenizer.get_vocab()
    template = ChatTemplate(tokenizer)
    own = {int(tokenizer.eos_token_id), template.end_id(template.example())}
    ends = sorted(own | {known[name] for name in names if name in known})
    bos = tokenizer.bos_token_id
    if bos is None or bos in ends:
        return Marks(None, False, np.asarray(ends))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    try:
        rendered = template.render(turns)
    except RefusedError:  # encoding reports the groups that a template refuses
        rendered = ""
    return Marks(int(bos), rendered.count(str(tokenizer.bos_token)) >= len(turns), np.asarray(ends))


@dataclass
class Account:
    """What was counted in some groups.

    Attributes:
        counts: groups, candidates, and of these how many have each fault, by the names under which `check` reports them.
        first: a group with each fault, by the same names.
        bad: places of the groups that can't be encoded, by the reason.
        tokens: candidates by how many tokens their ``prompt``, ``completion`` and ``both`` have, how many BOS tokens both hold
            (``bos``), and if they are finished and not cut, how many end tokens their completion holds (``end``).
        examples: the first encoded groups.
        encoding: what encoding counted.
        made: groups by how their string prompts were put to the model that wrote their candidates, where they record it.
        texts: for each count of texts that occur in several groups, digests of the texts, with the groups they are from.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    examples: list[EncodedGroup] = field(default_factory=list)
    encoding: EncodingReport = field(default_factory=EncodingReport)
    made: Counter[Rendering] = field(default_factory=Counter)
    texts: dict[str, list[tuple[bytes, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: Account) -> None:
        """Add what was counted in other groups, except for the texts."""
        self.counts += other.counts
        self.first = other.first | self.first
        for reason, places in other.bad.items():
            self.bad[reason] += places
        for name, counted in other.tokens.items():
            self.tokens[name] += counted
        self.examples = (self.examples + other.examples)[:_EXAMPLES]
        self.encoding.add(other.encoding)
        self.made += other.made

    def count(self, fault: str, number: int, group: Group) -> None:
        """Count a fault, and remember where it occurred first."""
        self.counts[fault] += number
        if number:
            self.first.setdefault(fault, _place(group))


def run_check(config: CheckConfig) -> dict[str, Any]:
    """Encode every group of a file as training with this model would, and list what must be fixed first.

    Returns:
        The counts, ``string_prompts`` (how plain strings are encoded), ``warnings``, ``ready``, ``mend`` (what must be fixed),
        and all of it as printable text under ``text``.

    Raises:
        ValueError: the data or the tokenizer can't be read.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    limits = limits_of_folder(config.model, trust_remote_code=config.trust_remote_code)
    encoder = make_encoder(tokenizer, config.encoding, limits=limits)
    held_out = frozenset[int]() if config.against is None else _held_out_runs(config.against)
    report, account = ReadReport(most=_LISTED), Account()
    groups = read_groups(config.data, schema=config.schema_name, on_bad_row="skip", report=report, join_rows=config.join_rows)
    examine = partial(_examine, encoder, marks_of(tokenizer), held_out)
    with ExitStack() as stack:
        seen = {name: stack.enter_context(closing(Seen())) for name in _ACROSS}
        bar = stack.enter_context(Bar("Checking groups", None))
        for part in map_chunks(examine, groups, workers=num_workers()):
            account.add(part)
            for name, digests in part.texts.items():
                seen[name].add_digests(digests)
            bar.advance(part.counts["groups"])
        across = {name: texts.repeated() for name, texts in seen.items()}
    if not account.counts["groups"]:
        raise ValueError("\n  ".join([f"{config.data} has no group to check: {report.summary()}", *report.examples]))
    mend = [
        *_unreadable(report, account),
        *_token_faults(account, max_length=config.encoding.max_length, context=limits.context),
        *_content_faults(account, against=config.against),
    ]
    facts = {
        **_facts(account, across, rows_skipped=report.skipped),
        "notes": [*report.counted_notes(), *account.encoding.text_notices()],
    }
    rendering = encoder.string_prompts
    warning = rendering_warning(account.made, rendering, what=config.data, does="training would encode them")
    facts |= {"string_prompts": rendering, "warnings": [] if warning is None else [warning]}
    return {**facts, "ready": not mend, "mend": mend, "text": _text(config.data, facts, mend, account, tokenizer)}


def _held_out_runs(path: str) -> frozenset[int]:
    """Hashes of all runs of 13 words in the prompts of an evaluation set, whose candidates may be absent.

    Raises:
        ValueError: it can't be read, or is empty.
    """
    groups = read_groups(path, on_bad_row="skip", allow_empty=True, join_rows=False)
    texts = [prompt_words(group, user_only=True) for group in groups]
    if not texts:
        raise ValueError(f"against: {path} has no prompt")
    return frozenset(run for text in texts for run in _hashed_runs(text))


def _hashed_runs(text: Sequence[str]) -> Iterator[int]:
    # Hashes of strings are the same in this process and in those forked from it, and take less memory.
    return map(hash, runs(text, RUN_WORDS))


def _place(group: Group) -> str:
    return group.origin or group.id


def _examine(encoder: Encoder, marks: Marks, held_out: frozenset[int], groups: Sequence[Group]) -> Account:
    """Encode some groups and count what is in them."""
    account = Account()
    encoder = copy(encoder)
    encoder.report = account.encoding
    for group in groups:
        rewards = [candidate.reward for candidate in group.candidates if candidate.reward is not None]
        account.counts["groups"] += 1
        account.counts["groups_with_string_prompts"] += isinstance(group.prompt, str)
        account.made.update(recorded_renderings(group.prompt, group.metadata))
        account.counts["candidates"] += len(group.candidates)
        account.counts["candidates_without_reward"] += len(group.candidates) - len(rewards)
        account.counts["groups_without_spread"] += len(set(rewards)) < 2
        account.texts["repeated_prompts"].append((digest(prompt_key(group)), _place(group)))
        known = bool(held_out) and not held_out.isdisjoint(_hashed_runs(prompt_words(group, user_only=True)))
        account.count("contaminated_prompts", known, group)
        encoded = _encoded(encoder, group, account)
        if encoded is not None:
            _count_tokens(encoder, marks, group, encoded, account)
            account.examples = [*account.examples, encoded][:_EXAMPLES]
    return account


def _encoded(encoder: Encoder, group: Group, account: Account) -> EncodedGroup | None:
    """The encoded group; None where training would leave it out or stop at it, which is counted by its reason."""
    reason = "no candidates"
    if group.candidates:
        try:
            _count_copies(group, account)
            return encoder.encode(group)
        except DroppedGroupError as dropped:
            reason = dropped.reason
    account.bad[reason].append(_place(group))
    return None


def _count_copies(group: Group, account: Account) -> None:
    """Count copies within a group, and keep one digest of each text for those across groups."""
    texts = [completion_text(candidate.completion) for candidate in group.candidates]
    exact = set(texts)
    near = {" ".join(words(text)) or text for text in exact}
    account.count("copies", len(texts) - len(exact), group)
    account.count("near_copies", len(exact) - len(near), group)
    account.texts["copies_across_groups"] += [(digest(text), _place(group)) for text in exact]
    account.texts["near_copies_across_groups"] += [(digest(text), _place(group)) for text in near]


def _count_tokens(encoder: Encoder, marks: Marks, group: Group, encoded: EncodedGroup, account: Account) -> None:
    for candidate, completion in zip(group.candidates, encoded.completions, strict=True):
        both = len(encoded.prompt) + len(completion)
        found = {"prompt": len(encoded.prompt), "completion": len(completion), "both": both}
        found["bos"] = marks.count_bos(encoded.prompt, completion)
        # A completion of several turns has an end token in each.
        if candidate.finished and both < encoder.max_length and is_plain(candidate.completion):
            found["end"] = int(np.isin(completion, marks.ends).sum())
        for name, number in found.items():
            account.tokens[name][number] += 1


def _unreadable(read: ReadReport, account: Account) -> Iterator[str]:
    """Rows that can't be read and groups that can't be encoded, with the place of each, up to a bound."""
    if read.skipped:
        rows = _listed(read.examples, read.skipped)
        yield f"{read.skipped} of {read.rows} rows can't be read: fix them, or train with on_bad_row: skip\n{rows}"
    for reason, places in sorted(account.bad.items(), key=lambda item: -len(item[1])):
        advice = "fix them, or on_bad_row: skip leaves them out of training"
        yield f"{len(places)} groups can't be encoded: {reason}; {advice}\n{_listed(places, len(places))}"


def _listed(shown: Sequence[str], number: int) -> str:
    rest = number - len(shown[:_LISTED])
    return "\n".join(f"     {line}" for line in [*shown[:_LISTED], *([f"and {rest} more"] if rest else [])])


def _token_faults(account: Account, *, max_length: int, context: int | None) -> Iterator[str]:
    """Wrong BOS and end tokens, cut texts, and completions that the template renders differently."""
    encoding = account.encoding
    doubled = sum(count for number, count in account.tokens["bos"].items() if number > 1)
    if doubled:
        yield (
            f"{doubled} candidates have more than one BOS token: prompts hold one as text, or template and tokenizer add one "
            "each"
        )
    wrong = sum(count for number, count in account.tokens["end"].items() if number != 1)
    if wrong:
        yield f"{wrong} candidates that are not cut don't end with exactly one end token: look at the chat template"
    if context is not None and max_length > context:
        yield f"max_length is {max_length} and the model has {context} positions: lower it"
    if encoding.completions_truncated:
        yield (
            f"{encoding.completions_truncated} completions lose their end at max_length {max_length} (first: "
            f"{encoding.first_truncated}): raise max_length, or shorten them"
        )
    if encoding.prompts_truncated:
        yield f"{encoding.prompts_truncated} prompts lose their beginning (first: {encoding.first_truncated}): raise max_length"
    if encoding.template_mismatches:
        yield (
            f"the chat template renders {encoding.template_mismatches} completions differently from a generated turn: fix the "
            "template"
        )


def _content_faults(account: Account, *, against: str | None) -> Iterator[str]:
    """Prompts of the evaluation set, copies, and no spread."""
    counts, first = account.counts, account.first
    if counts["contaminated_prompts"]:
        yield (
            f"{counts['contaminated_prompts']} prompts are prompts of {against} too, or share {RUN_WORDS} words in a row "
            f"with one (first: {first['contaminated_prompts']}): leave them out, or that evaluation measures memory"
        )
    if counts["copies"]:
        yield f"{counts['copies']} candidates are copies of another of their group (first: {first['copies']}): leave them out"
    if counts["groups_without_spread"] == counts["groups"]:
        yield "in no group do two rewards differ: there is nothing to learn"


def _quantiles(counts: Counter[int]) -> dict[str, int]:
    """Quantiles of counted whole numbers: for each share, the smallest number that so large a share does not exceed."""
    sizes = sorted(counts) or [0]
    upto: NDArray[np.int64] = np.cumsum([counts[size] for size in sizes])
    return {f"{q:g}": sizes[min(int(np.searchsorted(upto, q * upto[-1])), len(sizes) - 1)] for q in _QUANTILES}


def _facts(account: Account, across: Mapping[str, int], *, rows_skipped: int) -> dict[str, Any]:
    encoding, tokens = account.encoding, account.tokens
    return {
        "groups": account.counts["groups"],
        "groups_with_string_prompts": account.counts["groups_with_string_prompts"],
        "candidates": account.counts["candidates"],
        "rows_skipped": rows_skipped,
        "groups_dropped": {reason: len(places) for reason, places in account.bad.items()},
        **{name: account.counts[name] for name in _COUNTS},
        **across,
        "contaminated_prompts": account.counts["contaminated_prompts"],
        **{f"{mark}_tokens": {str(n): count for n, count in sorted(tokens[mark].items())} for mark in ("bos", "end")},
        **{name: getattr(encoding, name) for name in _ENCODING_COUNTS},
        "tokens": {name: _quantiles(tokens[name]) for name in _LENGTHS},
    }


def _text(
    data: str, facts: Mapping[str, Any], mend: Sequence[str], account: Account, tokenizer: PreTrainedTokenizerBase
) -> str:
    lines = [f"{data}: {facts['groups']} groups, {facts['candidates']} candidates"]
    if strings := facts["groups_with_string_prompts"]:
        lines.append(f"  prompts that are plain strings: {strings}, encoded as string_prompts {facts['string_prompts']}")
    for name, label in _LENGTHS.items():
        row = facts["tokens"][name]
        lines.append(f"  {label}: median {row['0.5']}, 90 % {row['0.9']}, 99 % {row['0.99']}, longest {row['1']}")
    lines += [f"  {name.replace('_', ' ')}: {facts[name]}" for name in _SHOWN_COUNTS]
    lines += [f"  note: {note}" for note in facts["notes"]]
    lines.append(f"  BOS tokens of a candidate: {_counts(facts['bos_tokens'])}; end tokens: {_counts(facts['end_tokens'])}")
    for group in account.examples:
        lines += ["", f"Group {group.id!r}, scored tokens in [brackets]:", token_layout(group, tokenizer, most=_SHOWN_TOKENS)]
    lines += ["", *facts["warnings"]]
    if mend:
        lines += ["To fix:", *(f"  {number}. {text}" for number, text in enumerate(mend, start=1))]
    else:
        lines.append("ready")
    return "\n".join(lines)


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{number} in {count}" for number, count in found.items()) or "none"

"""`ncalign check`: every group encoded as training will, and a list of what to mend before a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from ncalign.audit.measures import prompt_key, words
from ncalign.config import CheckConfig
from ncalign.encoding import DroppedGroupError, EncodedGroup, Encoder, EncodingReport, completion_text
from ncalign.groups import Group, ReadReport, read_groups
from ncalign.parallel import map_chunks, num_workers
from ncalign.policy import load_tokenizer, quiet_transformers
from ncalign.progress import Bar
from ncalign.training.dry_run import token_layout

_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_EXAMPLES = 2


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
        prompts: digests of the prompts' words, and how often each came.
        lengths: prompt and completion tokens of each candidate.
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
    prompts: Counter[bytes] = field(default_factory=Counter)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    examples: list[EncodedGroup] = field(default_factory=list)

    def add(self, other: Account) -> None:
        """Count what another one counted as well."""
        for name in ("groups", "candidates", "without_reward", "without_spread", "copies", "near_copies"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_copy = self.first_copy or other.first_copy
        self.bos += other.bos
        self.eos += other.eos
        self.prompts += other.prompts
        self.lengths += other.lengths
        self.examples = (self.examples + other.examples)[:_EXAMPLES]


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
    report, account = ReadReport(), Account()
    groups = read_groups(config.data, schema=config.schema_name, on_bad_row="skip", report=report)
    with Bar("Checking groups", None) as bar:
        for part, encoding in map_chunks(partial(_look, encoder), groups, workers=num_workers()):
            encoder.report.add(encoding)
            account.add(part)
            bar.advance(part.groups)
    if not account.groups:
        raise ValueError(
            f"{config.data} has no group to check: {report.summary()}" + "".join(f"\n  {e}" for e in report.examples)
        )
    contaminated = 0 if config.against is None else _shared_prompts(account, config.against)
    mend = to_mend(account, encoder.report, report, config, context=_context(config), contaminated=contaminated)
    facts = _facts(account, encoder.report, report, contaminated)
    return {**facts, "ready": not mend, "mend": mend, "text": _text(config, facts, mend, account, tokenizer)}


def _look(encoder: Encoder, groups: Sequence[Group]) -> tuple[Account, EncodingReport]:
    """Encode some groups, with an account of their own."""
    encoder = copy(encoder)
    encoder.report = EncodingReport()
    account = Account()
    for group in groups:
        account.groups += 1
        account.candidates += len(group.candidates)
        rewards = [candidate.reward for candidate in group.candidates if candidate.reward is not None]
        account.without_reward += len(group.candidates) - len(rewards)
        account.without_spread += len(set(rewards)) < 2
        account.prompts[_digest(prompt_key(group))] += 1
        try:
            _count_copies(group, account)
            encoded = encoder.encode(group)
        except DroppedGroupError:
            continue
        except ValueError as error:
            # What training would stop at: a missing chat template, a conversation that does not fit it.
            encoder.report.dropped[str(error).partition(": group ")[2].partition(": ")[2] or str(error)] += 1
            continue
        _count_tokens(encoder, group, encoded, account)
        if len(account.examples) < _EXAMPLES:
            account.examples.append(encoded)
    return account, encoder.report


def _count_copies(group: Group, account: Account) -> None:
    texts = [completion_text(candidate, group) for candidate in group.candidates]
    copies = len(texts) - len(set(texts))
    near = len(texts) - len({" ".join(words(text)) or text for text in texts}) - copies
    account.copies += copies
    account.near_copies += near
    if copies or near:
        account.first_copy = account.first_copy or (group.origin or group.id)


def _count_tokens(encoder: Encoder, group: Group, encoded: EncodedGroup, account: Account) -> None:
    tokenizer = encoder.tokenizer
    bos, ends = tokenizer.bos_token_id, _end_ids(tokenizer)
    # Where one token is both, counting it would count ends.
    in_prompt = int((encoded.prompt == bos).sum()) if bos is not None and bos not in ends else 0
    for candidate, completion in zip(group.candidates, encoded.completions, strict=True):
        account.lengths.append((len(encoded.prompt), len(completion)))
        inside = int((completion == bos).sum()) if bos is not None and bos not in ends else 0
        account.bos[in_prompt + inside] += 1
        if candidate.finished and len(encoded.prompt) + len(completion) < encoder.max_length:
            account.eos[int(np.isin(completion, ends).sum())] += 1


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that may end a turn: EOS, and what chat templates use for it."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")
    known = tokenizer.get_vocab()
    return sorted({int(tokenizer.eos_token_id), *(known[name] for name in names if name in known)})


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def _shared_prompts(account: Account, against: Path) -> int:
    """Groups whose prompt is one of an evaluation set's, but for case, punctuation and white space."""
    held_out = {_digest(prompt_key(group)) for group in read_groups(against, on_bad_row="skip", allow_empty=True)}
    return sum(count for digest, count in account.prompts.items() if digest in held_out)


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
    contaminated: int,
) -> list[str]:
    """What to mend, the worst first; nothing where the data are ready."""
    return list(_mend(account, encoding, read, config, context, contaminated))


def _mend(
    account: Account, encoding: EncodingReport, read: ReadReport, config: CheckConfig, context: int | None, contaminated: int
) -> Iterator[str]:
    if read.skipped:
        yield (
            f"{read.skipped} of {read.rows} rows can't be read (first: {read.examples[0]}): mend them, or train with "
            "on_bad_row: skip"
        )
    for reason, count in encoding.dropped.most_common():
        yield f"{count} groups can't be encoded: {reason}"
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
    if contaminated:
        yield f"{contaminated} prompts are prompts of {config.against} too: leave them out, or what is measured there is memory"
    if account.copies:
        yield f"{account.copies} candidates are copies of another of their group (first: {account.first_copy}): leave them out"
    if account.without_spread == account.groups:
        yield "in no group do two rewards differ: there is nothing to learn"


def _facts(account: Account, encoding: EncodingReport, read: ReadReport, contaminated: int) -> dict[str, Any]:
    lengths = np.array(account.lengths or [(0, 0)])
    quantiles = {
        name: {f"{q:g}": int(np.quantile(values, q, method="higher")) for q in _QUANTILES}
        for name, values in (("prompt", lengths[:, 0]), ("completion", lengths[:, 1]), ("both", lengths.sum(axis=1)))
    }
    repeated = sum(count for count in account.prompts.values() if count > 1)
    return {
        "groups": account.groups,
        "candidates": account.candidates,
        "rows_skipped": read.skipped,
        "groups_dropped": dict(encoding.dropped),
        "groups_without_spread": account.without_spread,
        "candidates_without_reward": account.without_reward,
        "copies": account.copies,
        "near_copies": account.near_copies,
        "repeated_prompts": repeated,
        "contaminated_prompts": contaminated,
        "bos_tokens": {str(number): count for number, count in sorted(account.bos.items())},
        "end_tokens": {str(number): count for number, count in sorted(account.eos.items())},
        "boundary_merges": encoding.boundary_merges,
        "repeated_eos": encoding.repeated_eos,
        "template_mismatches": encoding.template_mismatches,
        "prompts_truncated": encoding.prompts_truncated,
        "completions_truncated": encoding.completions_truncated,
        "tokens": quantiles,
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
        "repeated_prompts",
        "boundary_merges",
        "repeated_eos",
    ):
        lines.append(f"  {name.replace('_', ' ')}: {facts[name]}")
    lines.append(f"  BOS tokens of a candidate: {_counts(facts['bos_tokens'])}; end tokens: {_counts(facts['end_tokens'])}")
    for group in account.examples:
        lines += ["", f"Group {group.id!r}, scored tokens in [brackets]:", token_layout(group, tokenizer)]
    lines.append("")
    if mend:
        lines += ["To mend:", *(f"  {number}. {text}" for number, text in enumerate(mend, start=1))]
    else:
        lines.append("ready")
    return "\n".join(lines)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{number} in {count}" for number, count in found.items()) or "none"

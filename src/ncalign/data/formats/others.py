"""Schemas of other trainers and benchmarks with two answers a row: LLaMA-Factory, NeMo-Aligner, AlpacaEval's annotations."""

from __future__ import annotations

from typing import Any

from ncalign.core.errors import DataError, shown
from ncalign.data.formats.group import Group, Message
from ncalign.data.formats.parsing import Row, make_candidate, row_id, row_metadata
from ncalign.data.formats.ranked import candidate
from ncalign.data.formats.values import read_number

ALPACA = ("instruction", "chosen", "rejected")
ALPACA_KNOWN = ("id", *ALPACA, "input", "system", "history", "metadata")
SHAREGPT = ("conversations", "chosen", "rejected")
SHAREGPT_KNOWN = ("id", *SHAREGPT, "system", "metadata")
NEMO_ALIGNER = ("prompt", "chosen_response", "rejected_response")
NEMO_ALIGNER_KNOWN = ("id", *NEMO_ALIGNER, "chosen_reward", "rejected_reward", "metadata")
ANNOTATION = ("instruction", "output_1", "output_2", "preference")
ANNOTATION_KNOWN = ("id", *ANNOTATION, "generator_1", "generator_2", "metadata")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def parse_alpaca(row: Row, default_id: str, origin: str) -> Group:
    """Read LLaMA-Factory's alpaca pairs: instruction and input make the user's turn, after system and history."""
    instruction, extra = row["instruction"], row.get("input")
    text = "\n".join(part for part in (_string(instruction, "instruction"), _string(extra or "", "input")) if part)
    messages = _opening(row.get("system"), "system")
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise DataError(f"history is {shown(history)}: a list of [question, answer] is needed", reason="wrong type")
    for question, answer in history:
        messages += [{"role": "user", "content": _string(question, "history")}]
        messages += [{"role": "assistant", "content": _string(answer, "history")}]
    messages.append({"role": "user", "content": text})
    pair = [
        make_candidate(name, [{"role": "assistant", "content": _string(row[name], name)}], reward)
        for name, reward in (("chosen", 1.0), ("rejected", 0.0))
    ]
    return Group(row_id(row, default_id), messages, pair, row_metadata(row, ALPACA_KNOWN), origin)


def parse_sharegpt(row: Row, default_id: str, origin: str) -> Group:
    """Read LLaMA-Factory's sharegpt pairs: turns as from and value, an answer each as chosen and rejected."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"conversations is {shown(turns)}: a list of turns, not empty, is needed", reason="wrong type")
    messages = _opening(row.get("system"), "system") + [_turn(turn, f"conversations[{k}]") for k, turn in enumerate(turns)]
    pair = [make_candidate(name, [_turn(row[name], name)], reward) for name, reward in (("chosen", 1.0), ("rejected", 0.0))]
    return Group(row_id(row, default_id), messages, pair, row_metadata(row, SHAREGPT_KNOWN), origin)


def is_sharegpt(row: Row) -> bool:
    """Whether the turns are written as from and value."""
    found = row.get("conversations")
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and {"from", "value"} <= found[0].keys()


def parse_nemo_aligner(row: Row, default_id: str, origin: str) -> Group:
    """Read a NeMo-Aligner pair; rewards 1 and 0 unless columns give them."""
    rewards = (row.get("chosen_reward"), row.get("rejected_reward"))
    if rewards == (None, None):
        rewards = (1.0, 0.0)
    pair = [
        candidate(name, row[name], reward)
        for name, reward in zip(("chosen_response", "rejected_response"), rewards, strict=True)
    ]
    return Group(row_id(row, default_id), row["prompt"], pair, row_metadata(row, NEMO_ALIGNER_KNOWN), origin)


def parse_annotation(row: Row, default_id: str, origin: str) -> Group:
    """Read an AlpacaEval annotation: 1 prefers the first output, 2 the second, between them in part; 0 and 1.5 are ties."""
    preference = read_number(row["preference"], "preference")
    if preference is not None and preference != 0 and not 1 <= preference <= 2:
        raise DataError(f"preference is {preference:g}: 1 to 2, 0 for a tie, or null is needed", reason="out of range")
    second = None if preference is None else 0.5 if preference == 0 else preference - 1
    first = None if second is None else 1 - second
    pair = [
        candidate(f"output_{k}", row[f"output_{k}"], reward, row.get(f"generator_{k}"))
        for k, reward in ((1, first), (2, second))
    ]
    return Group(row_id(row, default_id), row["instruction"], pair, row_metadata(row, ANNOTATION_KNOWN), origin)


def _opening(system: Any, where: str) -> list[Message]:
    return [{"role": "system", "content": _string(system, where)}] if system else []


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise DataError(f"{where} is {shown(turn)}: an object with `from` and `value` is needed", reason="wrong type")
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise DataError(f"{where}.from is {shown(turn['from'])}: one of {', '.join(_ROLES)} is needed", reason="unknown role")
    return {"role": role, "content": _string(turn["value"], f"{where}.value")}


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {shown(value)}: a string is needed", reason="wrong type")
    return value

"""Schemas with a list of completions a row: Nectar, SimPO and AMPO, NeMo-RL, GSM8K model solutions, LMFlow."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ncalign.core.errors import DataError, names, shown
from ncalign.data.formats.group import Candidate, Group, Text
from ncalign.data.formats.parsing import Row, row_id, row_metadata
from ncalign.data.formats.transcripts import is_transcript, messages_of
from ncalign.data.formats.values import read_number

NECTAR = ("prompt", "answers")
NECTAR_KNOWN = ("id", *NECTAR, "metadata", "turns", "num_responses")
SCORE_COLUMNS = ("all_rm_scores", "all_reward_scores")
NEMO_RL = ("context", "completions")
LMFLOW = ("input", "output")
SOLUTIONS = ("question", "ground_truth")


def rewards_from_ranks(ranks: Sequence[Any], where: str) -> list[float | None]:
    """Share of the other ranked candidates that each one beats, a tie counting half: 1 for the best, 0 for the worst.

    Lower ranks are better, from whatever number they count; a candidate without a rank has no reward.

    >>> rewards_from_ranks([1, 3, 2, None], "rank")
    [1.0, 0.0, 0.5, None]
    >>> rewards_from_ranks([0, 0, 5], "rank")
    [0.75, 0.75, 0.0]
    """
    numbers = [read_number(rank, where) for rank in ranks]
    known = [number for number in numbers if number is not None]
    others = len(known) - 1
    if others <= 0:
        return [None if number is None else 1.0 for number in numbers]
    ordered = sorted(known)
    # Those worse than it, and half of those tied with it.
    beaten = {
        own: len(ordered) - bisect_right(ordered, own) + (bisect_right(ordered, own) - bisect_left(ordered, own) - 1) / 2
        for own in set(known)
    }
    return [None if own is None else beaten[own] / others for own in numbers]


def entries(row: Row, column: str, keys: Collection[str]) -> list[dict[str, Any]]:
    """A column's objects, each with these keys."""
    value = row[column]
    if not isinstance(value, list) or not value:
        raise DataError(f"{column} is {shown(value)}: a list of objects, not empty, is needed", reason="no candidates")
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DataError(f"{column}[{index}] is {shown(entry)}: an object is needed", reason="wrong type")
        lacking = [key for key in keys if key not in entry]
        if lacking:
            raise DataError(
                f"{column}[{index}] lacks {names(lacking)}, found {names(entry) or 'no keys'}", reason="missing key"
            )
    return value


def candidate(where: str, completion: Any, reward: Any, source: Any = None) -> Candidate:
    """A candidate; errors name the place that it came from."""
    try:
        return Candidate(completion, reward=read_number(reward, "reward"), source=source if isinstance(source, str) else None)
    except DataError as error:
        raise error.within(where) from None


def is_nectar(row: Row) -> bool:
    """Whether the answers have ranks."""
    found = row.get("answers")
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and "rank" in found[0]


def parse_nectar(row: Row, default_id: str, origin: str) -> Group:
    """Read a Nectar row: answers with ranks, 1 being the best; the prompt's transcript becomes turns."""
    answers = entries(row, "answers", ("answer", "rank"))
    rewards = rewards_from_ranks([entry["rank"] for entry in answers], "answers[].rank")
    prompt: Text = row["prompt"]
    turns = messages_of(prompt) if isinstance(prompt, str) and is_transcript(prompt) else None
    return Group(
        id=row_id(row, default_id),
        prompt=prompt if turns is None else turns,
        candidates=[
            candidate(f"answers[{k}]", _answer(entry["answer"], turns is not None), reward, entry.get("model"))
            for k, (entry, reward) in enumerate(zip(answers, rewards, strict=True))
        ],
        metadata=row_metadata(row, NECTAR_KNOWN),
        origin=origin,
    )


def _answer(text: Any, as_turn: bool) -> Any:
    return [{"role": "assistant", "content": text.strip()}] if as_turn and isinstance(text, str) else text


def list_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Columns of SimPO's or AMPO's schema, given those of a row."""
    present = set(columns)
    scores = next((name for name in SCORE_COLUMNS if name in present), SCORE_COLUMNS[0])
    return ("prompt", "all_generated_responses", scores)


def known_list_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The same and what follows from them: the pair that was made of the list."""
    return ("id", *list_columns(columns), "metadata", "chosen", "rejected")


def parse_lists(row: Row, default_id: str, origin: str) -> Group:
    """Read a row with a list of responses and one of scores, as SimPO's and AMPO's data have."""
    _, _, column = list_columns(row)
    responses, scores = row["all_generated_responses"], row[column]
    for name, value in (("all_generated_responses", responses), (column, scores)):
        if not isinstance(value, list) or not value:
            raise DataError(f"{name} is {shown(value)}: a list, not empty, is needed", reason="no candidates")
    if len(responses) != len(scores):
        raise DataError(
            f"there are {len(responses)} responses and {len(scores)} scores: one each is needed", reason="wrong length"
        )
    return Group(
        id=row_id(row, default_id),
        prompt=row["prompt"],
        candidates=[
            candidate(f"all_generated_responses[{k}]", response, score)
            for k, (response, score) in enumerate(zip(responses, scores, strict=True))
        ],
        metadata=row_metadata(row, known_list_columns(row)),
        origin=origin,
    )


def parse_nemo_rl(row: Row, default_id: str, origin: str) -> Group:
    """Read a NeMo-RL row: a context and completions with ranks, 0 being the best."""
    completions = entries(row, "completions", ("rank", "completion"))
    rewards = rewards_from_ranks([entry["rank"] for entry in completions], "completions[].rank")
    return Group(
        id=row_id(row, default_id),
        prompt=row["context"],
        candidates=[
            candidate(f"completions[{k}]", entry["completion"], reward)
            for k, (entry, reward) in enumerate(zip(completions, rewards, strict=True))
        ],
        metadata=row_metadata(row, ("id", *NEMO_RL, "metadata")),
        origin=origin,
    )


def is_lmflow(row: Row) -> bool:
    """Whether the outputs are texts with scores."""
    found = row.get("output")
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and {"text", "score"} <= found[0].keys()


def parse_lmflow(row: Row, default_id: str, origin: str) -> Group:
    """Read an instance of LMFlow's ``text_to_scored_textlist``."""
    outputs = entries(row, "output", ("text", "score"))
    return Group(
        id=row_id(row, default_id),
        prompt=row["input"],
        candidates=[candidate(f"output[{k}]", entry["text"], entry["score"]) for k, entry in enumerate(outputs)],
        metadata=row_metadata(row, ("id", *LMFLOW, "metadata")),
        origin=origin,
    )


def solution_columns(row: Row) -> list[str]:
    """Columns that hold a model's solution, marked right or wrong."""
    return [name for name, value in row.items() if isinstance(value, dict) and {"is_correct", "solution"} <= value.keys()]


def parse_solutions(row: Row, default_id: str, origin: str) -> Group:
    """Read a GSM8K row with a column of each model's solution: reward 1 where it is correct, 0 where it is not."""
    columns = solution_columns(row)
    for name in columns:
        if not isinstance(row[name]["is_correct"], bool):
            raise DataError(
                f"{name}.is_correct is {shown(row[name]['is_correct'])}: true or false is needed", reason="wrong type"
            )
    metadata = row_metadata(row, ("id", "question", *columns, "metadata"))
    truth = row["ground_truth"]
    if isinstance(truth, str) and "A:" in truth:
        metadata = {**metadata, "answer": truth.rpartition("A:")[2].strip()}
    return Group(
        id=row_id(row, default_id),
        prompt=row["question"],
        candidates=[candidate(name, row[name]["solution"], float(row[name]["is_correct"]), name) for name in columns],
        metadata=metadata,
        origin=origin,
    )

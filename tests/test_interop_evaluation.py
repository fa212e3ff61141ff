"""Other tools' judgements: read as they are, and written so that the tools read them."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_oracle import SHARED, alpaca_metrics
from ncalign.evaluation.interop import (
    games_of_annotations,
    read_alpaca_annotations,
    read_arena_judgements,
    read_fastchat_pairs,
    read_fastchat_ratings,
    write_alpaca_annotations,
    write_arena_judgements,
    write_fastchat_ratings,
)
from ncalign.evaluation.preferences import question_preferences
from ncalign.evaluation.records import Answer, Game, Question, Rating
from ncalign.evaluation.win_rate import win_rate


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["alpaca-7b", "gemma-2b-it"])
def test_real_annotations(name: str) -> None:
    path = SHARED / f"annotations_{name}.json.gz"
    if not path.exists():
        pytest.skip("the data sets are not here")
    rows = read_alpaca_annotations(path)
    assert len(rows) == 805
    expected = alpaca_metrics().get_winrate([{"preference": row.preference} for row in rows])
    found = win_rate(question_preferences(games_of_annotations(rows)).preferences)
    assert found.win_rate == pytest.approx(expected["win_rate"], abs=1e-6)
    assert found.num_missing == 805 - expected["n_total"]


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=2, max_size=8).filter(lambda row: any(v is not None for v in row))
)
def test_annotations_written_are_what_alpaca_eval_counts(values: list[float | None]) -> None:
    questions = [Question(str(k), (f"Q{k}",), "part") for k in range(len(values))]
    mine = {q.id: Answer(q.id, "new", (f"n{q.id}",)) for q in questions}
    other = {q.id: Answer(q.id, "old", (f"o{q.id}",)) for q in questions}
    preferences = {q.id: math.nan if v is None else v for q, v in zip(questions, values, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        write_alpaca_annotations(path, questions, mine, other, preferences, annotator="judge")
        rows, read = json.loads(path.read_text()), read_alpaca_annotations(path)
    expected = alpaca_metrics().get_winrate(rows)
    found = win_rate(np.array(list(preferences.values())))
    assert found.win_rate == pytest.approx(expected["win_rate"], abs=1e-6)
    assert [(row.generators, row.outputs, row.dataset) for row in read] == [
        (("old", "new"), (f"o{q.id}", f"n{q.id}"), "part") for q in questions
    ]
    back = question_preferences(games_of_annotations(read)).preferences
    assert back == pytest.approx(np.array(list(preferences.values())), nan_ok=True)


LABELS = ["A>>B", "A>B", "A=B", "B>A", "B>>A", None]


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=6))
def test_arena_judgements_come_back(labels: list[tuple[str | None, str | None]]) -> None:
    rows = [
        {"question_id": f"q{k}", "model": "new", "judge": "j", "games": [{"judgment": "...", "score": one}, {"score": two}]}
        for k, (one, two) in enumerate(labels)
    ]
    with tempfile.TemporaryDirectory() as folder:
        games = read_arena_judgements(lines(Path(folder) / "old.jsonl", rows), baseline="old")
        write_arena_judgements(games, Path(folder) / "new.jsonl", judge="j")
        again = read_arena_judgements(Path(folder) / "new.jsonl")
    assert again == games
    # In the first game A is the baseline, in the second the model.
    worth = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
    for k, (one, two) in enumerate(labels):
        first, second = games[2 * k], games[2 * k + 1]
        assert (first.model_first, second.model_first) == (False, True)
        assert first.preference == (None if one is None else 1 - worth[one])
        assert second.preference == (None if two is None else worth[two])
        assert first.weight == (3 if one in ("A>>B", "B>>A") else 1)


def test_log_probs_become_labels(tmp_path: Path) -> None:
    games = [Game("q", "new", "old", True, 0.9), Game("q", "new", "old", False, 0.2), Game("r", "new", "old", True, 0.5)]
    write_arena_judgements(games, tmp_path / "j.jsonl", judge="j")
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [[game["score"] for game in row["games"]] for row in rows] == [["A>B", "A>B"], [None, "A=B"]]
    with pytest.raises(ValueError, match="judged twice in one order"):
        write_arena_judgements([games[0], games[0]], tmp_path / "j.jsonl", judge="j")


def test_fastchat_ratings_and_pairs(tmp_path: Path) -> None:
    ratings = [Rating("81", "m", 1, "writing", 7.5), Rating("81", "m", 2, "writing", None)]
    write_fastchat_ratings(ratings, tmp_path / "r.jsonl", judge="gpt-4")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["score"], row["turn"], row["judge"][0]) for row in rows] == [
        (81, 7.5, 1, "gpt-4"),
        (81, -1, 2, "gpt-4"),
    ]
    assert read_fastchat_ratings(tmp_path / "r.jsonl", categories={"81": "writing"}) == ratings
    pairs = [
        {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "model_1", "g2_winner": "tie", "turn": 1},
        {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "error", "g2_winner": "model_2", "turn": 2},
    ]
    found = read_fastchat_pairs(lines(tmp_path / "p.jsonl", pairs))
    assert [(game.question, game.model_first, game.preference) for game in found] == [
        ("81", True, 1.0),
        ("81", False, 0.5),
        ("81 (turn 2)", True, None),
        ("81 (turn 2)", False, 0.0),
    ]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_alpaca_annotations, {"instruction": "a"}, r"rows\.jsonl:1 is no annotation .* lacks `output_1`"),
        (
            read_alpaca_annotations,
            {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 3},
            r"rows\.jsonl:1: preference is 3",
        ),
        (
            read_alpaca_annotations,
            {"instruction": "a", "output_1": "b", "output_2": 1, "preference": 1},
            r"rows\.jsonl:1: output_2 is 1",
        ),
        (read_arena_judgements, {"uid": "a", "model": "m", "baseline": "b", "games": [{}]}, r"rows\.jsonl:1 is no judgement"),
        (read_arena_judgements, {"uid": "a", "model": "m", "games": [{}, {}]}, r"does not name the baseline"),
        (
            read_arena_judgements,
            {"uid": "a", "model": "m", "baseline": "b", "games": [{"score": "A"}, {}]},
            r"rows\.jsonl:1: score is 'A'",
        ),
        (read_fastchat_ratings, {"question_id": 1, "model": "m", "turn": 1, "score": 11}, r"rows\.jsonl:1: turn is 1"),
        (read_fastchat_ratings, {"question_id": 1}, r"rows\.jsonl:1 is no rating"),
        (read_fastchat_pairs, {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "x"}, r"rows\.jsonl:1 is no"),
    ],
)
def test_rows_that_can_not_be_used(read: Any, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(lines(tmp_path / "rows.jsonl", [row]))

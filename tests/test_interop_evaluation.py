"""Other tools' judgements: read as they are, and written so that the tools read them."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_oracle import SHARED, alpaca_metrics
from ncalign.judging.interop import (
    games_of_annotations,
    read_alpaca_annotations,
    read_arena_judgements,
    read_fastchat_pairs,
    read_fastchat_ratings,
    write_alpaca_annotations,
    write_arena_judgements,
    write_fastchat_pairs,
    write_fastchat_ratings,
)
from ncalign.judging.records import Answer, Question
from ncalign.stats.arena_hard import arena_hard_scores
from ncalign.stats.preferences import complete_games, question_preferences
from ncalign.stats.records import Game, Rating
from ncalign.stats.win_rate import win_rate


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


# The oracle's first call imports it.
@settings(deadline=None)
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


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=2, max_size=8))
def test_arena_hard_counts_what_is_written(labels: list[tuple[str | None, str | None]]) -> None:
    """By what its show_result reads: uid, model, category, and the scores of the two games, of which neither is null."""
    games = []
    for k, pair in enumerate(labels):
        for model_first, label in zip((False, True), pair, strict=True):
            first = None if label is None else {"A": 1.0, "=": 0.5, "B": 0.0}["=" if "=" in label else label[0]]
            mine = first if first is None or model_first else 1 - first
            games.append(Game(f"q{k}", "new", "old", model_first, mine, 3 if label and ">>" in label else 1, label or ""))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new.jsonl"
        write_arena_judgements(games, path, judge="j", categories={f"q{k}": "hard_prompt" for k in range(len(labels))})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["uid"], row["question_id"], row["category"], row["model"]) for row in rows] == [
        (f"q{k}", f"q{k}", "hard_prompt", "new") for k in range(len(labels))
    ]
    worth = {"A>>B": [1.0] * 3, "A>B": [1.0], "A=B": [0.5], "B>A": [0.0], "B>>A": [0.0] * 3}
    scores: list[float] = []
    for row in rows:
        second, first = (game["score"] for game in row["games"])
        if first is not None and second is not None:
            scores += worth[first] + [1 - score for score in worth[second]]
    if not scores:
        return
    [found] = arena_hard_scores(complete_games(games)[0])
    assert found.score == pytest.approx(100 * sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("said", "means"), [("A<B", "B>A"), ("A<<B", "B>>A"), ("B=A", "A=B"), ("B<A", "A>B"), ("B<<A", "A>>B")]
)
def test_arena_hard_labels_the_other_way_round(said: str, means: str, tmp_path: Path) -> None:
    row = {
        "uid": "q",
        "model": "new",
        "baseline": "old",
        "category": "hard_prompt",
        "games": [{"score": said}, {"score": means}],
    }
    first, second = read_arena_judgements(lines(tmp_path / "j.jsonl", [row]))
    assert (first.verdict, second.verdict) == (means, means)
    assert first.preference is not None
    assert first.preference == 1 - (second.preference or 0.0)
    assert first.weight == second.weight == (3 if "<<" in said else 1)


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


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, None])] * 2), min_size=1, max_size=8))
def test_fastchat_counts_the_pairs_that_are_written(values: list[tuple[float | None, float | None]]) -> None:
    names = ["81" if k == 0 else f"{80 + k} (turn 2)" for k in range(1, len(values) + 1)]
    games = [
        Game(name, "new", "old", first, value, verdict={1.0: "model_1", 0.0: "model_2", 0.5: "tie", None: "error"}[value])
        for name, pair in zip(names, values, strict=True)
        for first, value in zip((True, False), pair, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judge_pair.jsonl"
        write_fastchat_pairs(games, path, judge="j")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert read_fastchat_pairs(path) == games
    # Its show_result: an error leaves the row out; a tie in the first game, or two winners, is a tie.
    counted = [row for row in rows if "error" not in (row["g1_winner"], row["g2_winner"])]
    expected = [
        0.5 if row["g1_winner"] in ("tie",) or row["g1_winner"] != row["g2_winner"] else float(row["g1_winner"] == "model_1")
        for row in counted
    ]
    both = [pair for pair in values if None not in pair]
    assert expected == [a if a == b and a is not None else 0.5 for a, b in both]
    assert all(row["model_1"] == "new" and isinstance(row["question_id"], int) and row["judge"][0] == "j" for row in rows)


def test_a_pair_judged_twice(tmp_path: Path) -> None:
    game = Game("81", "new", "old", True, 1.0)
    with pytest.raises(ValueError, match="judged twice in one order"):
        write_fastchat_pairs([game, game], tmp_path / "p.jsonl", judge="j")


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
        (
            read_arena_judgements,
            {"uid": "a", "model": "m", "baseline": "b", "games": [{}]},
            r"rows\.jsonl:1: games is a list",
        ),
        (read_arena_judgements, {"uid": "a", "model": "m", "games": [{}, {}]}, r"does not name the baseline"),
        (
            read_arena_judgements,
            {"uid": "a", "model": "m", "baseline": "b", "games": [{"score": "D"}, {}]},
            r"rows\.jsonl:1: score is 'D'",
        ),
        (read_fastchat_ratings, {"question_id": 1, "model": "m", "turn": 1, "score": 11}, r"rows\.jsonl:1: score is 11"),
        (read_fastchat_ratings, {"question_id": 1}, r"rows\.jsonl:1 is no rating"),
        (read_fastchat_pairs, {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "x"}, r"rows\.jsonl:1 is no"),
    ],
)
def test_rows_that_can_not_be_used(read: Any, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(lines(tmp_path / "rows.jsonl", [row]))

"""Exports of Argilla and distilabel, as these tools write them, through the public command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncalign.cli.app import main

Write = Callable[..., Path]
Convert = Callable[..., list[dict[str, Any]]]
Rewards = list[tuple[str, float | None]]


@pytest.fixture
def convert(write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Convert rows by the command, and return the groups; the notes are in ``convert.text``."""

    def run(*rows: dict[str, Any], schema: str = "auto", parquet: bool = False) -> list[dict[str, Any]]:
        path = write_jsonl(rows, "export.jsonl")
        if parquet:
            path = tmp_path / "export.parquet"
            pq.write_table(pa.Table.from_pylist([*rows]), path)
        assert main(["convert", str(path), str(tmp_path / "groups.jsonl"), "--from", schema, "--overwrite"]) == 0
        run.text = capsys.readouterr().out  # type: ignore[attr-defined]
        return [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]

    return run


def rewards(group: dict[str, Any]) -> Rewards:
    for candidate in group["candidates"]:
        assert [turn["role"] for turn in candidate["completion"]] == ["assistant"]
    return [(candidate["completion"][0]["content"], candidate["reward"]) for candidate in group["candidates"]]


def submitted(value: Any, user: str = "u1", status: str | None = "submitted") -> dict[str, Any]:
    return {"user_id": user, "value": value, "status": status}


def ranking(*ranked: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"rank": rank, "value": name} for rank, name in ranked]


def feedback(*answers: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row of a `FeedbackDataset` that ``format_as("datasets")`` made: the template for preferences."""
    return {
        "prompt": "Q",
        "response1": "a",
        "response2": "b",
        "response3": "c",
        "preference": [*answers],
        "preference-suggestion": None,
        "preference-suggestion-metadata": {"type": None, "score": None, "agent": None},
        "external_id": "e1",
        "metadata": '{"topic": "t"}',
        **more,
    }


@pytest.mark.parametrize("parquet", [False, True])
def test_rankings_of_several_annotators_with_ties(convert: Convert, parquet: bool) -> None:
    row = feedback(
        submitted(ranking((1, "response1"), (2, "response2"), (2, "response3"))),
        submitted(ranking((1, "response2"), (2, "response1"), (3, "response3")), "u2"),
        submitted(ranking((1, "response3"), (2, "response1"), (3, "response2")), "u3", "discarded"),
        submitted(ranking((1, "response3"), (2, "response1"), (3, "response2")), "u4", "draft"),
    )
    [group] = convert(row, parquet=parquet)
    # The share of the other two that each beats, a tie half: the first annotator says 1, 1/4, 1/4, and the second 1/2, 1, 0.
    assert rewards(group) == [("a", (1 + 0.5) / 2), ("b", (0.25 + 1) / 2), ("c", (0.25 + 0) / 2)]
    assert group["prompt"] == [{"role": "user", "content": "Q"}]
    assert (group["id"], group["metadata"]) == ("e1", {"topic": "t"})
    assert "2 answers of annotators are drafts, discarded or pending, and were not used" in convert.text  # type: ignore[attr-defined]


def test_rankings_as_objects_of_lists(convert: Convert) -> None:
    value = {"rank": [3, 1, 2], "value": ["Response 1", "response-2", "response_3"]}
    nested = {"user_id": ["u1", "u2"], "value": [value, value], "status": ["submitted", "discarded"]}
    for row in (feedback(submitted(value)), feedback(preference=nested)):
        assert rewards(convert(row)[0]) == [("a", 0.0), ("b", 1.0), ("c", 0.5)]


def test_a_suggestion_stands_in_where_nobody_submitted(convert: Convert) -> None:
    suggestion = {"rank": [2, 1, 3], "value": ["response1", "response2", "response3"]}
    draft = submitted(ranking((1, "response3")), status="draft")
    [group, without] = convert(
        feedback(draft, **{"preference-suggestion": suggestion}), feedback(external_id=None, **{"preference-suggestion": None})
    )
    assert rewards(group) == [("a", 0.5), ("b", 1.0), ("c", 0.0)]
    assert rewards(without) == [("a", None), ("b", None), ("c", None)]
    assert without["id"] == "2"
    assert "1 groups without a submitted answer have their rewards from a suggestion" in convert.text  # type: ignore[attr-defined]


def test_a_partial_ranking_and_an_answer_that_is_null(convert: Convert) -> None:
    [group, other] = convert(
        feedback(submitted(ranking((1, "response3"), (2, "response1")))),
        feedback(submitted(ranking((1, "response2"), (2, "response3"), (3, "response1"))), response2=None, external_id="e2"),
    )
    assert rewards(group) == [("a", 0.0), ("b", None), ("c", 1.0)]
    assert rewards(other) == [("a", 0.0), ("c", 1.0)]


def test_a_choice_is_a_ranking(convert: Convert) -> None:
    [group] = convert(feedback(submitted("Response 2"), submitted("none of them", "u2")))
    assert rewards(group) == [("a", 0.25), ("b", 1.0), ("c", 0.25)]


def dataset_2(**more: Any) -> dict[str, Any]:
    """A row of ``rg.Dataset(...).records.to_datasets()`` of Argilla 2, where a ranking is the names, the best first."""
    return {
        "id": "r1",
        "status": "completed",
        "_server_id": "7",
        "instruction": "Q",
        "reply_1": "a",
        "reply_2": "b",
        "ranking.responses": [["reply-2", "reply-1"], ["reply-1", "reply-2"], ["reply-2", "reply-1"]],
        "ranking.responses.users": ["u1", "u2", "u3"],
        "ranking.responses.status": ["submitted", "discarded", "submitted"],
        "ranking.suggestion": ["reply-1", "reply-2"],
        "ranking.suggestion.score": None,
        "ranking.suggestion.agent": "judge",
        "topics.responses": [["law", "tax"]],
        "topics.responses.users": ["u1"],
        "topics.responses.status": ["submitted"],
        **more,
    }


@pytest.mark.parametrize("parquet", [False, True])
def test_argilla_2(convert: Convert, parquet: bool) -> None:
    [group] = convert(dataset_2(), parquet=parquet)
    assert rewards(group) == [("a", 0.0), ("b", 1.0)]
    assert group["metadata"]["topics.responses"] == [["law", "tax"]]
    assert not [name for name in group["metadata"] if name.startswith("ranking")]


def test_argilla_2_without_answers(convert: Convert) -> None:
    nothing = {name: None for name in dataset_2() if name.startswith("ranking.responses")}
    [group] = convert(dataset_2(**nothing))
    assert rewards(group) == [("a", 1.0), ("b", 0.0)]


def test_argilla_2_as_nested_json(convert: Convert) -> None:
    first = {
        "id": "r0",
        "fields": {"prompt": "Q0", "response-1": "a", "response-2": "b"},
        "metadata": {"topic": "t"},
        "suggestions": {},
        "responses": {},
        "vectors": {},
        "status": "pending",
        "_server_id": "1",
    }
    answers = [{"value": ["response-2", "response-1"], "user_id": "u", "status": "submitted"}]
    second = {**first, "id": "r1", "responses": {"order": answers}}
    [none, group] = convert(first, second)
    assert rewards(none) == [("a", None), ("b", None)]
    assert rewards(group) == [("a", 0.0), ("b", 1.0)]
    assert group["metadata"] == {"topic": "t", "status": "pending", "_server_id": "1"}


def test_ratings_of_each_answer(convert: Convert) -> None:
    """What distilabel's PreferenceToArgilla makes, with annotators, and with its ratings as suggestions."""
    row = {
        "id": "0f3a",
        "instruction": "Q",
        "generations-0": "a",
        "generations-1": "b",
        "generations-2": None,
        "generations-0-rating.responses": [5, 4, 1],
        "generations-0-rating.responses.users": ["u1", "u2", "u3"],
        "generations-0-rating.responses.status": ["submitted", "submitted", "discarded"],
        "generations-0-rating.suggestion": 1,
        "generations-1-rating.responses": None,
        "generations-1-rating.suggestion": 2,
        "generations-0-rationale.suggestion": "good",
    }
    [group] = convert(row)
    assert rewards(group) == [("a", 4.5), ("b", 2.0)]
    assert group["metadata"] == {"generations-0-rationale.suggestion": "good"}


def test_ratings_of_several_aspects(convert: Convert) -> None:
    kinds = {"helpful-1": [4], "helpful-2": [2, 3], "true-1": [1], "true-2": [2]}
    questions = {name: [submitted(value, f"u{value}") for value in values] for name, values in kinds.items()}
    [group] = convert({"question": "Q", "completion_1": "a", "completion_2": "b", **questions})
    assert rewards(group) == [("a", 2.5), ("b", 2.25)]
    assert group["metadata"]["aspects"] == {"helpful": [4.0, 2.5], "true": [1.0, 2.0]}


def test_a_list_of_completions(convert: Convert) -> None:
    order = [submitted(ranking((1, "completions-2"), (2, "completions-1")))]
    [group] = convert({"input": "Q", "completions": ["a", "b"], "order": order, "system_prompt": "S"})
    assert rewards(group) == [("a", 0.0), ("b", 1.0)]
    assert [turn["role"] for turn in group["prompt"]] == ["system", "user"]
    assert "metadata" not in group


def test_a_ranking_of_what_is_not_there(write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([feedback(submitted(ranking((1, "answer-9"))))])
    assert main(["convert", str(data), str(tmp_path / "out.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "groups.jsonl:1" in error
    assert "preference ranks 'answer-9' (a string), which is none of the answers `response1`" in error


def distilabel(**more: Any) -> dict[str, Any]:
    return {
        "instruction": "Q",
        "generations": ["a", None, "c"],
        "model_names": ["m1", "m2", "m3"],
        "ratings": [4, None, None],
        "rationales": ["good", None, "bad"],
        "distilabel_metadata": {"raw_output_ultra_feedback_0": None},
        **more,
    }


def test_distilabel_with_nulls(convert: Convert) -> None:
    [group] = convert(distilabel())
    assert rewards(group) == [("a", 4.0), ("c", None)]
    assert [candidate["source"] for candidate in group["candidates"]] == ["m1", "m3"]
    assert group["metadata"]["rationales"] == ["good", "bad"]
    assert "1 generations are null and were left out" in convert.text  # type: ignore[attr-defined]


def test_distilabel_with_the_pair_that_it_made(convert: Convert) -> None:
    turns = [{"role": "user", "content": "Q"}]
    pair = {name: [*turns, {"role": "assistant", "content": text}] for name, text in (("chosen", "a"), ("rejected", "c"))}
    [group] = convert(distilabel(**pair, prompt="Q", prompt_id="7", chosen_rating=4))
    assert rewards(group) == [("a", 4.0), ("c", None)]
    assert group["metadata"]["chosen_rating"] == 4
    assert not {"chosen", "rejected"} & group["metadata"].keys()


def test_distilabel_of_version_0(convert: Convert) -> None:
    row = {
        "system": "S",
        "input": "Q",
        "generations": ["a", "b"],
        "rating": [8.5, 7.0],
        "rationale": "The first ...",
        "generation_model": "m",
        "chosen": "a",
        "rejected": "b",
    }
    [group] = convert(row)
    assert rewards(group) == [("a", 8.5), ("b", 7.0)]
    assert group["prompt"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert group["metadata"] == {"rationale": "The first ..."}


def test_distilabel_without_ratings_or_as_text(convert: Convert) -> None:
    chat = {"messages": [{"role": "user", "content": "Q"}], "generations": ["a", "b"], "ratings": ["5", "N/A"]}
    [unrated, null, text] = convert(
        {"instruction": "Q", "generations": ["a", "b"]}, {"instruction": "Q", "generations": ["a", "b"], "ratings": None}, chat
    )
    assert rewards(unrated) == rewards(null) == [("a", None), ("b", None)]
    assert rewards(text) == [("a", 5.0), ("b", None)]
    assert text["prompt"] == chat["messages"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratings": [1, 2]}, "there are 3 generations and 2 ratings: one each is needed"),
        ({"ratings": ["good", None, None]}, "ratings[0] is 'good' (a string): a number is needed"),
        ({"generations": [None, None, None]}, "all generations are null"),
        ({"ratings": 5}, "ratings is 5 (a number): a list with an entry for each generation is needed"),
    ],
)
def test_distilabel_rows_that_can_not_be_used(
    changes: dict[str, Any], message: str, write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([distilabel(**changes)])
    assert main(["convert", str(data), str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_a_misspelt_column_of_ratings(write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([{"instruction": "Q", "generations": ["a", "b"], "rattings": [1, 2]}])
    assert main(["convert", str(data), str(tmp_path / "out.jsonl")]) == 1
    assert "did you mean `ratings`?" in capsys.readouterr().err


def test_check_reads_them(write_jsonl: Write, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        feedback(submitted(ranking((1, "response1"), (2, "response2"))), prompt=f"Question {k}", external_id=f"e{k}")
        for k in range(3)
    ]
    main(["check", str(write_jsonl(rows)), "--model", str(tiny_model_dir), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["groups"], found["candidates"], found["candidates_without_reward"]) == (3, 9, 3)

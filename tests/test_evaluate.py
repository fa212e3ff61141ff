"""`ncalign evaluate`, whole: models, judges, other tools' verdicts, tasks; what it writes, and what it says of itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from alpaca_oracle import SHARED, alpaca_metrics, annotations, length_controlled, write_table
from ncalign.cli.app import main
from ncalign.data.groups import read_groups
from ncalign.judging.config import EvaluateConfig
from ncalign.judging.evaluate import run_evaluate
from server_double import ServerDouble, serving


def evaluate(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    fixed = {"output_dir": tmp_path / "out", "overwrite": True, "cache_dir": tmp_path / "cache", "num_resamples": 200}
    config = {**fixed, **settings}
    return run_evaluate(EvaluateConfig.model_validate(config))


def question_file(path: Path, number: int = 24, **more: Any) -> Path:
    path.write_text("".join(json.dumps({"question_id": k, "turns": [f"What is {k}?"], **more}) + "\n" for k in range(number)))
    return path


def answer_file(path: Path, text: str, number: int = 24) -> Path:
    rows = [{"question": str(k), "model": path.stem, "turns": [f"{text} {k} " + "w " * (k % 5)]} for k in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def unexplained(out: Path) -> None:
    """Every missing cell of the tables that an evaluation wrote has a reason."""
    for path in (out / "tables").glob("*.json"):
        table = json.loads(path.read_text())
        given = {(one["row"], one["column"]) for one in table["missing"]}
        name = table["columns"][0]
        lacking = {(row[name], column) for row in table["rows"] for column, cell in row.items() if cell in (None, "–")}
        assert lacking == given, path.name


def test_two_files_of_answers_compare_without_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    for name, text in (("first", "pour."), ("second", "POUR.")):
        row = {"question": "tea-lowercase", "model": f"run-{name}", "turns": [text]}
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["evaluate", "first.jsonl", "second.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Called by what the answers say.
    assert found["models"] == ["run-first", "run-second"]
    assert found["given"] == {"run-first": "first.jsonl", "run-second": "second.jsonl"}
    assert found["win_rates"]["run-first"]["win_rate"] == 100.0
    unexplained(Path("runs/evaluate"))
    assert "length control needs 20 questions with a verdict, there are 1" in Path("runs/evaluate/report.html").read_text()
    # By their files where both name the same model.
    Path("second.jsonl").write_text(json.dumps({**row, "model": "run-first"}) + "\n")
    assert main(["evaluate", "first.jsonl", "second.jsonl", "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["first", "second"]


def test_with_no_flags_two_models_follow_instructions(tmp_path: Path, tiny_model_dir: Path, capsys: Any) -> None:
    other = answer_file(tmp_path / "other.jsonl", "no")
    # Answers to another set count nowhere, and that is an error, not a loss.
    words = [
        "evaluate",
        "--model",
        str(tiny_model_dir),
        "--output_dir",
        str(tmp_path / "out"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    words += ["--max_new_tokens", "6", "--num_resamples", "100"]
    assert main([*words, "--against", str(other)]) == 1
    assert "has no answer to a question of the set instructions" in capsys.readouterr().err
    lower = tmp_path / "lower.jsonl"
    lower.write_text(json.dumps({"question": "tea-lowercase", "model": "lower", "turns": ["pour."]}) + "\n")
    assert main([*words, "--against", str(lower), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean_reward"]["lower"] == 1.0
    assert found["unanswered"] == {"lower": 37}
    assert found["win_rates"][tiny_model_dir.name]["num_counted"] == 1
    assert any("not whether what it says is right" in line for line in found["notes"])
    assert (tmp_path / "out" / "answers" / f"{tiny_model_dir.name}.jsonl").is_file()


def by_answer(body: dict[str, Any], number: int) -> str:
    """Prefers answers that say good."""
    first, second = re.findall(r"<answer_[ab] \w+>\n(.*?)\n</answer", body["messages"][-1]["content"], flags=re.DOTALL)
    return f"[[{'A>>B' if 'good' in first and 'good' not in second else 'B>A' if 'good' in second else 'A=B'}]]"


def test_a_judge_and_three_models(tmp_path: Path) -> None:
    questions = question_file(tmp_path / "q.jsonl")
    models = [
        str(answer_file(tmp_path / f"{name}.jsonl", text)) for name, text in (("a", "good"), ("b", "bad"), ("c_$x", "bad"))
    ]
    double = ServerDouble(by_answer)
    with serving(double) as url:
        judge = {"base_url": url, "mode": "labels", "price_in": 1.0, "price_out": 2.0}
        settings = {"model": models[0], "against": models[1:], "set_name": str(questions), "judge": judge}
        found = evaluate(tmp_path, **settings)
        asked = len(double.requests)
        again = evaluate(tmp_path, **settings)
    # c against b: the same answers, which nobody is asked about.
    assert asked == 48
    assert len(double.requests) == asked
    assert again["verdicts"][0]["remembered"] == 48
    assert found["baseline"] == "b"
    assert {name: row["win_rate"] for name, row in found["win_rates"].items()} == {"a": 100.0, "c_$x": 50.0}
    assert found["missing_verdicts"] == 0
    assert found["verdicts"][0]["cost"] == pytest.approx(48 * (7 * 1.0 + 3 * 2.0) / 1e6)
    assert not found["judge"]["position"]["biased"]
    # Shown first a good answer wins by far, shown second by a little: weights 3 and 1.
    assert {row["model"]: row["score"] for row in found["arena_hard"]} == {"a": 100.0, "c_$x": 50.0}
    out = tmp_path / "out"
    for name in ("win_rates", "judge", "arena_hard"):
        for suffix in ("txt", "json", "csv", "tex"):
            assert (out / "tables" / f"{name}.{suffix}").stat().st_size > 0
    assert (out / "win_rates.png").read_bytes().startswith(b"\x89PNG")
    games = [json.loads(line) for line in (out / "games.jsonl").read_text().splitlines()]
    assert len(games) == 96
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [(pair["question"], pair["model"], pair["baseline"]) for pair in pairs[:2]] == [("0", "a", "b"), ("1", "a", "b")]
    assert (pairs[1]["preference"], pairs[1]["shown_first"], pairs[1]["shown_second"]) == (1.0, 1.0, 1.0)
    assert (pairs[1]["answer"], pairs[1]["baseline_answer"]) == ("good 1 w ", "bad 1 w ")
    page = (out / "report.html").read_text()
    assert page.count("good 1 w ") == 1
    unexplained(out)
    rows = json.loads((out / "annotations" / "a.json").read_text())
    assert alpaca_metrics().get_winrate(rows)["win_rate"] == pytest.approx(100.0)
    # The annotations are groups too: what was judged can be trained on.
    assert next(iter(read_groups(out / "annotations" / "a.json"))).candidates[1].reward == 1.0


def test_other_files_of_verdicts_and_two_judges(tmp_path: Path) -> None:
    labels = ["A>>B", "B>A", "A=B", "A>B", "B>>A", None] * 4
    rows = [
        {"uid": f"q{k}", "model": name, "baseline": "old", "games": [{"score": one}, {"score": "A=B"}]}
        for name, shift in (("new", 0), ("newer", 2))
        for k, one in enumerate(labels[shift:] + labels[:shift])
    ]
    (tmp_path / "arena.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(tmp_path, judgements=[tmp_path / "arena.jsonl"])
    # The first game of a row shows the baseline first, the second is a tie: A is the baseline.
    worth = {"A>>B": 0.0, "A>B": 0.0, "A=B": 0.5, "B>A": 1.0, "B>>A": 1.0}
    known = [(worth[one] + 0.5) / 2 for one in labels if one is not None]
    for name in ("new", "newer"):
        assert found["win_rates"][name]["win_rate"] == pytest.approx(100 * sum(known) / len(known))
        assert found["win_rates"][name]["num_missing"] == 4
    assert set(found["win_matrix"]["models"]) == {"old", "new", "newer"}
    unexplained(tmp_path / "out")
    assert "win rate against old: newer to new" in found["comparisons"]
    assert found["length_controlled"] == {}
    games = [
        {"question": f"q{k}", "model": "new", "baseline": "old", "model_first": True, "preference": 0.5} for k in range(24)
    ]
    (tmp_path / "games.jsonl").write_text("".join(json.dumps(game) + "\n" for game in games))
    found = evaluate(tmp_path, judgements=[tmp_path / "arena.jsonl"], compare_games=tmp_path / "games.jsonl")
    # Both call every second game a tie.
    assert found["judge"]["agreement"]["agreement"] == pytest.approx(100.0)
    assert found["judge"]["agreement"]["num_counted"] == 24
    ratings = [
        {"question_id": k, "model": name, "judge": ["j", "p"], "turn": 1, "score": score, "tstamp": 0.0}
        for k in (1, 2)
        for name, score in (("new", 7), ("old", -1 if k == 1 else 4))
    ]
    (tmp_path / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ratings))
    found = evaluate(tmp_path, judgements=[tmp_path / "ratings.jsonl"])
    means = {row["model"]: (row["overall"]["mean"], row["overall"]["num_missing"]) for row in found["ratings"]}
    assert means == {"new": (7.0, 0), "old": (4.0, 1)}


def test_missing_verdicts_are_told_and_come_later(tmp_path: Path) -> None:
    questions = question_file(tmp_path / "q.jsonl", 6)
    models = [str(answer_file(tmp_path / f"{name}.jsonl", text, 6)) for name, text in (("a", "good"), ("b", "bad"))]
    double = ServerDouble(by_answer)
    double.fault_of = lambda body: 500 if "What is 3?" in body["messages"][-1]["content"] else None
    with serving(double) as url:
        judge = {"base_url": url, "mode": "labels", "max_retries": 0, "attempts": 1}
        settings = {"model": models[0], "against": models[1:], "set_name": str(questions), "judge": judge}
        found = evaluate(tmp_path, **settings)
        assert found["missing_verdicts"] == 2
        assert (found["win_rates"]["a"]["num_counted"], found["win_rates"]["a"]["num_missing"]) == (5, 1)
        assert found["win_rates"]["a"]["win_rate"] == 100.0
        assert "2 verdicts are missing; they are neither losses nor ties" in found["text"]
        double.fault_of = lambda body: None
        before = len(double.requests)
        assert evaluate(tmp_path, **settings)["missing_verdicts"] == 0
        assert len(double.requests) == before + 2


def test_ratings_by_turn_and_category(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "category": "math", "turns": ["2 + 2?", "3 + 3?"]},
        {"question_id": 2, "category": "writing", "turns": ["Write.", "More."]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = {"question_id": 1, "choices": [{"index": 0, "turns": ["four", "six"]}]}
    (tmp_path / "ref.jsonl").write_text(json.dumps(reference) + "\n")
    for name, text in (("a", "good"), ("b", "bad")):
        lines = [json.dumps({"question": str(k), "model": name, "turns": [f"{text} one", f"{text} two"]}) for k in (1, 2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def rate(body: dict[str, Any], number: int) -> str:
        prompt = body["messages"][-1]["content"]
        rating = 8 - 3 * ("bad" in prompt) + ("<reference " in prompt) - (" two" in prompt)
        return f"So [[{rating}]]"

    with serving(ServerDouble(rate)) as url:
        settings: dict[str, Any] = {
            "model": str(tmp_path / "a.jsonl"),
            "against": [str(tmp_path / "b.jsonl")],
            "set_name": "mt-bench",
            "set_file": tmp_path / "q.jsonl",
            "judge": {"base_url": url, "mode": "rating"},
        }
        bare = evaluate(tmp_path, **settings)
        found = evaluate(tmp_path, **settings, reference_answers=tmp_path / "ref.jsonl")
    assert [line for line in bare["notes"] if line.startswith("1 questions of math, reasoning and coding have no reference")]
    assert not [line for line in found["notes"] if "no reference" in line]
    by_model = {row["model"]: row for row in found["ratings"]}
    # Turn 1: 9 with a reference and 8 without; turn 2 a point less.
    assert by_model["a"]["overall"]["mean"] == pytest.approx((9 + 8 + 8 + 7) / 4)
    assert {turn: row["mean"] for turn, row in by_model["a"]["turns"].items()} == {"1": 8.5, "2": 7.5}
    assert {name: row["mean"] for name, row in by_model["b"]["categories"].items()} == {"math": 5.5, "writing": 4.5}
    assert found["comparisons"]["rating: b to a"]["difference"] == pytest.approx(3.0)
    unexplained(tmp_path / "out")
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [(pair["question"], pair["rating"], pair["baseline_rating"]) for pair in pairs] == [("1", 8.5, 5.5), ("2", 7.5, 4.5)]


@pytest.mark.parametrize("name", ["alpaca-7b", "gemma-2b-it"])
def test_other_tools_verdicts_give_their_numbers(name: str, tmp_path: Path) -> None:
    path = SHARED / f"annotations_{name}.json.gz"
    if not path.exists():
        pytest.skip("the data sets are not here")
    rows = annotations(name)
    model, table = rows[0]["generator_2"], write_table(tmp_path / "table.csv", seed=0)
    for variant, settings in (("length_controlled_minimal", {}), ("length_controlled_v1", {"difficulty_table": table})):
        found = evaluate(tmp_path, judgements=[path], **settings)
        expected = alpaca_metrics().get_winrate(rows)["win_rate"]
        assert found["win_rates"][model]["win_rate"] == pytest.approx(expected, abs=1e-6)
        expected = length_controlled(rows, variant, table)["length_controlled_winrate"]
        assert found["length_controlled"][model]["win_rate"] == pytest.approx(expected, abs=1e-3)
        unexplained(tmp_path / "out")


def test_without_scikit_learn_the_numbers_that_need_it_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    rows = [
        {"instruction": f"{k}", "output_1": "x" * (k + 1), "output_2": "y" * (2 * k + 1), "preference": 1 + k % 2}
        | {"generator_1": "old", "generator_2": "new"}
        for k in range(24)
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    found = evaluate(tmp_path, judgements=[tmp_path / "annotations.json"])
    assert found["win_rates"]["new"]["win_rate"] == pytest.approx(50.0)
    assert found["length_controlled"] == {}
    unexplained(tmp_path / "out")
    assert any(re.match(r"no length-controlled win rates: .* pip install .*\[eval\]'", line) for line in found["notes"])
    row = {"uid": "q", "model": "new", "baseline": "old", "games": [{"score": "A>B"}, {"score": "A=B"}]}
    (tmp_path / "arena.jsonl").write_text(json.dumps(row) + "\n")
    found = evaluate(tmp_path, judgements=[tmp_path / "arena.jsonl"])
    assert "arena_hard" in found
    assert "strengths" not in found
    assert any(re.match(r"strengths: .* pip install .*\[eval\]'", line) for line in found["notes"])


def test_what_is_refused(tmp_path: Path) -> None:
    questions = question_file(tmp_path / "q.jsonl")
    a = str(answer_file(tmp_path / "a.jsonl", "good"))
    for settings, message in (
        ({}, "model is needed"),
        ({"model": a}, "against is needed"),
        ({"model": a, "against": [a]}, "two of the models are the same"),
        ({"model": a, "against": ["b"], "set_name": str(questions)}, "needs a judge"),
        ({"model": a, "against": ["b"], "judge": {}, "reward": ["instructions"]}, "two judges"),
        ({"model": a, "against": ["b"], "set_name": "alpaca-eval", "judge": {}}, "tatsu-lab/alpaca_eval"),
        ({"model": a, "against": [str(tmp_path / "none")]}, "there is no such folder or file"),
        ({"model": a, "against": ["none.jsonl"]}, "there is no such folder or file"),
        ({"model": "m", "tasks": ["gsm8k"], "task_data": ["svamp"]}, "TASK=FILE is needed"),
        ({"model": "m", "tasks": ["gsm8k"], "judgements": ["a.jsonl"]}, "tasks and judgements are two evaluations"),
        ({"tasks": ["gsm8k"]}, "model is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, **settings)
    assert not (tmp_path / "out" / "results.json").exists()

"""Tables in their four forms and charts: nothing lost, nothing read as markup."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ncalign.core.json import json_ready
from ncalign.judging.summaries import (
    arena_table,
    comparison_table,
    judge_table,
    length_control_words,
    mt_bench_table,
    strength_table,
    win_matrix_table,
    win_rate_table,
)
from ncalign.judging.tasks import tabulate_tasks
from ncalign.report.charts import category_chart, interval_chart, matrix_chart, write_chart
from ncalign.report.tables import Column, Table, escape_latex, from_json, to_csv, to_json, to_latex, to_text, write_table
from ncalign.stats.agreement import judge_agreement, length_bias, position_bias
from ncalign.stats.arena_hard import arena_hard_scores
from ncalign.stats.bradley_terry import bradley_terry
from ncalign.stats.length_control import length_controlled_win_rate
from ncalign.stats.mt_bench import mt_bench
from ncalign.stats.paired import paired_comparison
from ncalign.stats.records import Game, Rating
from ncalign.stats.win_rate import win_matrix, win_rate

# Names as they come: mathtext, LaTeX, markup of rich's, a legend's private mark, another script, a terminal's escape.
NASTY = ("$x_1$", r"a\b{c}~^%#&", "[bold red]x[/]", "_private", "模型", "\x1b[31mred", 'a,b\n"c"', "<img src=x>")


def nasty_table() -> Table:
    rows = tuple((name, 1.0 / (i + 3), None if i % 2 else i) for i, name in enumerate(NASTY))
    return Table((Column("mo_del$"), Column("rate %", 1), Column("n")), rows, "50 % & more_")


def test_csv_gives_every_number_back_whole() -> None:
    table = nasty_table()
    header, *rows = csv.reader(io.StringIO(to_csv(table)))
    assert header == ["mo_del$", "rate %", "n"]
    for row, (name, rate, count) in zip(rows, table.rows, strict=True):
        assert row[0] == name
        assert float(row[1]) == rate
        assert row[2] == ("" if count is None else str(count))


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-2+3+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\rx", " =1", "\uff1d1", '=HYPERLINK("http://x")']
)
def test_csv_keeps_text_from_being_a_formula(text: str) -> None:
    table = Table((Column(text), Column("n")), ((text, -1.5), ("-1.5", -2), ("a-b=c", None)))
    rows = list(csv.reader(io.StringIO(to_csv(table), newline="")))
    written = "'" + text.replace("\r", "\n")
    assert rows == [[written, "n"], [written, "-1.5"], ["-1.5", "-2"], ["a-b=c", ""]]


def test_json_gives_every_number_back_whole_and_null_for_what_is_missing() -> None:
    table = Table((Column("a"), Column("b")), ((0.1 + 0.2, math.nan), (math.inf, "x"), (None, 3)))
    read = json.loads(json.dumps(to_json(table), allow_nan=False))
    assert read["rows"] == [{"a": 0.1 + 0.2, "b": None}, {"a": None, "b": "x"}, {"a": None, "b": 3}]


def test_a_dash_has_its_reason_in_text_and_json_and_json_gives_the_table_back() -> None:
    reasons = {("a", "x"): "one question", ("", "y"): "never met", ("b", ""): "no answer"}
    table = Table(
        (Column("m"), Column("x", 1), Column("y")), (("a", None, math.nan), ("b", None, 1.0), ("c", 2.0, None)), "all", reasons
    )
    text = to_text(table)
    assert text.count("\n– (") == 3
    assert "– (a: x): one question" in text
    assert "– (a, c: y): never met" in text
    assert "– (b: x): no answer" in text
    found = json.loads(json.dumps(to_json(table), allow_nan=False))
    assert found["missing"] == [
        {"row": "a", "column": "x", "reason": "one question"},
        {"row": "a", "column": "y", "reason": "never met"},
        {"row": "b", "column": "x", "reason": "no answer"},
        {"row": "c", "column": "y", "reason": "never met"},
    ]
    again = from_json(found)
    assert (again.columns, again.caption, again.reason_lines()) == (table.columns, table.caption, table.reason_lines())
    assert to_json(again) == found


def test_text_shows_names_as_they_are_and_no_control_characters() -> None:
    text = to_text(nasty_table())
    assert "[bold red]x[/]" in text
    assert "$x_1$" in text
    assert "\x1b" not in text
    assert "0.3 " in text
    assert text.count("–") == len(NASTY) // 2


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_latex_leaves_no_special_character_bare(text: str) -> None:
    escaped = escape_latex(text)
    # What is left once our own escapes are taken away must be free of anything that LaTeX reads as a command.
    bare = re.sub(r"\\[{}$&#%_]|\\text[a-z]+\{\}|\$\\(?:up|down)arrow\$", "", escaped)
    assert not set(bare) & set('\\{}$&#%_~^<>|"\n\r')


def test_latex_has_a_row_for_each_row_and_numbers_to_the_right() -> None:
    lines = to_latex(nasty_table()).splitlines()
    assert r"\begin{tabular}{lrr}" in lines
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == len(NASTY)
    assert all(len(re.findall(r"(?<!\\)&", line)) == 2 and line.endswith(r" \\") for line in body)
    assert body[0] == r"\$x\_1\$ & 0.3 & 0 \\"
    # A row that starts with a bracket would be read as the row's spacing before it.
    assert body[2].startswith("{}[")


def test_a_table_refuses_rows_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="row 2 has 1 cells; there are 2 columns"):
        Table((Column("a"), Column("b")), ((1, 2), (1,)))
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        Table((Column("a"), Column("a")), ())


def test_files_hold_their_form_and_others_are_refused(tmp_path: Path) -> None:
    table = nasty_table()
    forms = {"csv": to_csv(table), "tex": to_latex(table) + "\n", "txt": to_text(table) + "\n"}
    for suffix, text in forms.items():
        write_table(table, tmp_path / f"t.{suffix}")
        assert (tmp_path / f"t.{suffix}").read_bytes().decode() == text
    write_table(table, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == to_json(table)
    with pytest.raises(ValueError, match=r"\.json, \.csv, \.tex or \.txt"):
        write_table(table, tmp_path / "t.xlsx")
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.tex", "t.txt", "t.json"}


def games() -> list[Game]:
    rng = np.random.default_rng(0)
    return [
        Game(f"q{q}", name, "base", first, [0.0, 0.5, 1.0, None][rng.integers(4)])
        for q in range(40)
        for name in NASTY
        for first in (True, False)
    ]


def test_summaries_hold_the_results_numbers() -> None:
    rng = np.random.default_rng(0)
    p, ours, theirs = rng.uniform(size=30), rng.integers(1, 99, size=30), rng.integers(1, 99, size=30)
    rates = {"low": win_rate(p / 2), "high": win_rate((1 + p) / 2)}
    controlled = {"low": length_controlled_win_rate(p / 2, ours, theirs)}
    rows = to_json(win_rate_table(rates, controlled, baseline="base"))["rows"]
    assert [row["model"] for row in rows] == ["high", "low"]
    assert rows[1]["LC (%)"] == controlled["low"].win_rate
    assert rows[0]["LC (%)"] is None
    assert (rows[0]["low"], rows[0]["high"]) == rates["high"].ci

    found = bradley_terry(games(), anchor="base")
    table = strength_table(found)
    assert [row["rating"] for row in to_json(table)["rows"]] == [strength.rating for strength in found.strengths]
    assert f"{found.num_missing} games have no verdict" in table.caption

    scores = arena_hard_scores(games())
    assert [row["score (%)"] for row in to_json(arena_table(scores))["rows"]] == [score.score for score in scores]

    matrix = win_matrix(games())
    cells = to_json(win_matrix_table(matrix))["rows"]
    for i, name in enumerate(matrix.models):
        assert cells[i]["model"] == name
        assert cells[i][f"vs {name}"] is None
        if name != "base":
            assert cells[i]["vs base"] == matrix.rates[i, matrix.models.index("base")]

    before, after = rng.uniform(size=9), rng.uniform(size=9)
    comparison = paired_comparison(before, after, seed=0)
    (row,) = to_json(comparison_table({"win rate": comparison}))["rows"]
    assert (row["difference"], row["p"]) == (comparison.difference, comparison.p_value)


def test_a_length_controlled_rate_that_is_not_estimable_is_said_so_in_every_form() -> None:
    # The longer answer always wins: there is no fit at equal lengths.
    lengths = np.arange(40)
    found = length_controlled_win_rate((lengths > 19).astype(float), 1000 + 30 * (lengths - 19), np.full(40, 1000))
    plain = win_rate(np.array([0.0, 1.0] * 20))
    table = win_rate_table({"a": plain, "b": plain}, {"a": found}, baseline="base")
    first, second = to_json(table)["rows"]
    assert (first["LC (%)"], first["LC remark"], second["LC remark"]) == (None, "not estimable", "")
    assert "not estimable" in to_csv(table)
    assert "not estimable" in to_text(table, width=200)
    assert "not estimable" in length_control_words(found)
    assert "LC remark" not in to_json(win_rate_table({"a": plain}, {}, baseline="base"))["columns"]


def test_an_even_rate_is_as_detectable_whatever_was_won() -> None:
    # 2.8 standard errors of 20 wins and losses at 50 %; ten of ten would have no error at all.
    (row,) = to_json(win_rate_table({"a": win_rate(np.ones(20))}, {}, baseline="base"))["rows"]
    assert row["detectable"] == pytest.approx((1.959964 + 0.841621) * 50 / math.sqrt(20), abs=1e-4)
    assert (row["low"], row["high"]) == pytest.approx((100 * 20 / (20 + 1.959964**2), 100), abs=1e-4)


def test_p_values_of_several_comparisons_are_holms() -> None:
    # Twelve differences of one sign: p = 2 / 2^12; the other is certain chance.
    sure, even = (paired_comparison(np.zeros(12), after, seed=0) for after in (np.ones(12), np.tile([1.0, -1.0], 6)))
    table = comparison_table({"sure": sure, "even": even})
    assert [row["p"] for row in to_json(table)["rows"]] == pytest.approx([2 * 2 / 2**12, 1])
    assert "Holm" in table.caption
    assert "Holm" not in comparison_table({"sure": sure}).caption


def test_every_table_with_intervals_says_which() -> None:
    ratings = [Rating(f"{i}", "a", 1, "math", float(i)) for i in range(5)]
    found = {"x": paired_comparison(np.zeros(5), np.arange(5.0), seed=0)}
    for table in (
        win_rate_table({"a": win_rate(np.array([0.0, 1.0]))}, {}, baseline="base"),
        strength_table(bradley_terry(games(), anchor="base")),
        arena_table(arena_hard_scores(games())),
        mt_bench_table(mt_bench(ratings)),
        comparison_table(found),
    ):
        assert "95 % interval" in table.caption


def test_scores_of_tasks_have_wilsons_interval() -> None:
    # 8 of 10; the same with an error as of half as many, as questions of a kind have; all of 10, whose error is 0; no share.
    score = {"metric": "acc", "stderr": None, "num_samples": 10}
    scores = {
        "plain": score | {"score": 0.8},
        "clusters": score | {"score": 0.8, "stderr": math.sqrt(0.8 * 0.2 / 5)},
        "all": score | {"score": 1.0, "stderr": 0.0},
        "other": score | {"score": 7.5},
    }
    results = tabulate_tasks([{"model": "a", "results": scores, "failed": {}}], limit=None)
    table = results.tables["tasks"]
    found = {row["task"]: (row["low"], row["high"]) for row in to_json(table)["rows"]}
    for name, won, num in (("plain", 8, 10), ("clusters", 4, 5), ("all", 10, 10)):
        expected = stats.binomtest(won, num).proportion_ci(method="wilson")
        assert found[name] == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert found["other"] == (None, None)
    assert "95 % interval" in table.caption


def test_mt_bench_table_has_turns_and_categories_that_may_have_the_same_name() -> None:
    ratings = [Rating("1", "a", 1, "mean", 4.0), Rating("1", "a", 2, "mean", None), Rating("2", "b", 1, "math", 9.0)]
    first, second = to_json(mt_bench_table(mt_bench(ratings)))["rows"]
    assert (first["model"], first["category math"], first["category mean"], first["turn 2"]) == ("b", 9.0, None, None)
    assert (second["mean"], second["category mean"], second["missing"]) == (4.0, 4.0, 1)


def test_judge_table_tells_what_was_measured() -> None:
    mine = [game for game in games() if game.model == NASTY[0]]
    lengths = {(game.question, name): len(game.question) + len(name) for game in mine for name in (game.model, "base")}
    place, length, agreement = position_bias(mine), length_bias(mine, lengths), judge_agreement(mine, mine)
    rows = {row["the judge"]: row["value"] for row in to_json(judge_table(place, length, agreement))["rows"]}
    assert rows["answer shown first preferred (%)"] == place.first_place
    assert rows["Cohen's kappa"] == 1
    assert rows["questions that lack an order"] == place.num_incomplete
    assert len(to_json(judge_table(place, None, None))["rows"]) < len(rows)


def test_results_become_json_whole() -> None:
    matrix, strengths = win_matrix(games()), bradley_terry(games(), anchor="base")
    read = json.loads(json.dumps(json_ready({"matrix": matrix, "strengths": strengths}), allow_nan=False))
    assert read["matrix"]["models"] == list(matrix.models)
    assert read["matrix"]["rates"][0][0] is None
    assert read["matrix"]["num_counted"] == matrix.num_counted.tolist()
    assert read["strengths"]["strengths"][0]["rating_ci"] == list(strengths.strengths[0].rating_ci)
    with pytest.raises(TypeError, match="set has no form"):
        json_ready([{1, 2}])


def test_charts_draw_every_name_and_value(tmp_path: Path) -> None:
    series = {
        "win rate": {name: (40.0 + i, (35.0 + i, 45.0 + i)) for i, name in enumerate(NASTY)},
        "$length_controlled$": {NASTY[0]: (50.0, (math.nan, math.nan)), NASTY[1]: (math.nan, (0.0, 0.0))},
    }
    figure = interval_chart(series, title="Win rates of $a_b$", unit="%", reference=50)
    (axes,) = figure.axes
    first, second = (container[0].get_xdata() for container in axes.containers)
    assert list(first) == [40.0 + i for i in range(len(NASTY))]
    assert list(second) == [50.0]
    assert len(axes.get_yticklabels()) == len(NASTY)
    assert not any(text.get_parse_math() for text in (*axes.get_yticklabels(), axes.title, *axes.get_legend().get_texts()))
    for suffix in ("png", "svg"):
        write_chart(figure, tmp_path / f"chart.{suffix}")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.fromstring((tmp_path / "chart.svg").read_bytes()).tag.endswith("svg")
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        write_chart(figure, tmp_path / "chart.pdf")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_values_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two"):
        write_chart(matrix_chart(win_matrix(games())), tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_category_chart_has_a_bar_for_each_mean(tmp_path: Path) -> None:
    ratings = [Rating(f"{i}", name, 1, f"cat_${i}", float(1 + i)) for name in NASTY[:4] for i in range(3)]
    ratings.append(Rating("9", NASTY[4], 1, "cat_$0", None))
    figure = category_chart(mt_bench(ratings))
    (axes,) = figure.axes
    heights = [bar.get_height() for container in axes.containers if hasattr(container, "patches") for bar in container.patches]
    assert sorted(heights) == sorted([1.0, 2.0, 3.0] * 4)
    assert len(axes.get_legend().get_texts()) == 5
    write_chart(figure, tmp_path / "chart.png")


def test_matrix_chart_shows_the_rates(tmp_path: Path) -> None:
    matrix = win_matrix(games())
    figure = matrix_chart(matrix)
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.asarray(shown.filled(np.nan)), matrix.rates)
    assert len(figure.axes[0].texts) == np.isfinite(matrix.rates).sum()
    write_chart(figure, tmp_path / "matrix.svg")


def test_charts_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no value to draw"):
        interval_chart({"win rate": {"a": (math.nan, (math.nan, math.nan))}}, title="t", unit="%")
    with pytest.raises(ValueError, match="no rating to draw"):
        category_chart(mt_bench([Rating("1", "a", 1, "math", None)]))

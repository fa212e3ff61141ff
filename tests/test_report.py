"""The report page: complete without a network, and safe whatever a model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import UndefinedError

from ncalign.cli.config import ReportConfig
from ncalign.cli.report import run_report
from ncalign.report.html import render
from ncalign.report.online_page import write_rounds_report
from ncalign.report.page import metric_charts, write_report
from ncalign.report.plots import MOST_POINTS, Chart, Series, histogram
from ncalign.report.runs import evaluations_of, is_of, read_metrics, read_run, runs_table
from ncalign.report.settings import differing
from ncalign.report.several_page import overlaid
from ncalign.training.run_folder import MetricsFile

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}</style></pre>'
ESCAPED = re.escape("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{ 7*7 }}{% raw %}&lt;/style&gt;&lt;/pre&gt;")


def assert_shown_literally(page: str, times: int) -> None:
    """What tries to break out of the page, or to be run by the template, stands there as text, this many times."""
    # One script of our own, and one element of data for each chart, in which no text ends it.
    scripts = re.findall(r"<script[^>]*>", page)
    assert set(scripts) == {"<script>", '<script type="application/json">'}
    assert (scripts.count("<script>"), page.count("</script>")) == (1, len(scripts))
    body = page[page.index("<main>") : page.index("</main>")]
    assert "<img" not in body
    assert (page.count("<style>"), page.count("</style>")) == (1, 1)
    assert body.count("<pre") == body.count("</pre>")
    assert "49" not in body
    assert len(re.findall(ESCAPED, body)) == times


def policy_of(page: str) -> dict[str, str]:
    """The content security policy of a page, by directive."""
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert found is not None
    return dict(one.strip().split(" ", 1) for one in found[1].split(";"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run whose texts try to break out of the page."""
    rows = [
        {"step": s, "loss": 1 / s, "logps/chosen_change": -s, "logps/rejected_change": -2 * s, "kernel/entropy": 1.0}
        for s in (1, 2)
    ]
    rows.append({"step": 2, "eval/loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = {name: 0.25 for name in ("before", "after", "difference")}
    measured |= {f"{name}_interval": [0.125, 0.5] for name in ("before", "after", "difference")} | {"p_value": 0.0625}
    answer = {"outcome": EVIL, "prompt": EVIL, "before": EVIL, "after": EVIL, "reward_before": 0.0, "reward_after": 1.0}
    results = {"method": EVIL, "comparison": {EVIL: measured}, "answers": [answer], "model": EVIL}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_all_text_is_escaped(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    # Once below the heading, once as the comparison's name, four times in the answers, and three times in the results.
    assert_shown_literally(page, times=9)


def test_answers_while_training_stand_by_prompt_and_step(run_folder: Path) -> None:
    steps = range(0, 100, 10)
    asked: dict[str, Any] = {"a": [{"role": "user", "content": EVIL}], "b": "2 + 2 ="}
    rows = [
        {"step": step, "id": name, "prompt": prompt, "completion": f"{name} at {step}" if step else EVIL, "tokens": 3}
        for step in steps
        for name, prompt in asked.items()
        if (name, step) != ("b", 60)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_folder / "samples.jsonl").write_text(text + '{"step": 1}\n{"step": 100, "id": "a", "comp')
    page = write_report(run_folder).read_text()
    # Nine elsewhere on the page; a prompt and two answers here.
    assert_shown_literally(page, times=12)
    section = page[page.index("Samples while training") : page.index("<h2>Held-out groups")]
    assert re.findall(r'data-column="(step \d+)"', section) == [f"step {step}" for step in (0, 30, 60, 90)] * 2
    assert [found for found in re.findall(r"[ab] at \d+", section)] == ["a at 30", "a at 60", "a at 90", "b at 30", "b at 90"]
    assert section.count(">–</td>") + section.count(">–<td") == 1


def test_nothing_is_loaded_from_elsewhere_and_only_our_script_runs(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    assert not re.findall(r'(?:src|href)="', page)
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    policy = policy_of(page)
    assert policy["default-src"] == "'none'"
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        [own] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert policy[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"


def test_figures_are_those_of_the_results(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    assert page.count("0.250 <small>[0.125, 0.500]</small>") == 3
    assert '<td class="n">0.0625' in page


def test_logged_steps_are_lines_and_held_out_groups_dashed_ones(run_folder: Path) -> None:
    rows = read_metrics(run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2]
    main, others = metric_charts(rows)
    assert [chart.title for chart in main] == ["Loss", "Log-prob change since the start", "Kernel entropy"]
    assert others == []
    loss, held_out = main[0].spec()["series"]
    assert (loss["points"], loss["dashed"], loss["colour"]) == ([[1, 1.0], [2, 0.5]], False, 0)
    assert (held_out["points"], held_out["dashed"], held_out["colour"]) == ([[2, 0.5]], True, 0)


def test_a_run_that_is_under_way_has_a_page(run_folder: Path) -> None:
    (run_folder / "results.json").unlink()
    page = write_report(run_folder).read_text()
    assert "not finished: step 2 is the last one logged" in page


def test_a_long_line_keeps_its_spikes() -> None:
    points = [(step, float(step == 12345)) for step in range(20000)]
    [line] = Chart("t", "x", "y", [Series("s", points)]).spec()["series"]
    assert len(line["points"]) <= 2 * MOST_POINTS
    assert [12345, 1.0] in line["points"]
    assert line["points"] == sorted(line["points"])


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], None),
        ([math.nan, math.inf], None),
        ([3.0] * 4, [(0, 4)]),
        ([-1e308, 1e308], [(0, 2)]),
        ([0.0, 0.5, 1.0, 1.0], [(0.25, 1), (0.75, 3)]),
    ],
)
def test_histograms_of_any_values(values: list[float], bars: list[tuple[float, int]] | None) -> None:
    found = histogram("t", "x", values, bins=2)
    assert (found and list(found.series[0].points)) == bars


@pytest.mark.parametrize(
    "end", [b'{"step": 3, "lo', b"\x00\x00\xff", b"[1]\n5\n", b'{"loss": 1.0}', b'{"step": null, "loss": 1}', b"[" * 9999]
)
def test_damaged_lines_of_the_metrics_are_told_and_left_out(
    end: bytes, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + end)
    assert write_report(run_folder).is_file()
    assert "metrics.jsonl: " in (told := capsys.readouterr().err)
    assert "damaged lines are left out (first: line 4)" in told
    MetricsFile(path, keep_until=2, num_steps=9)
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [1, 2, 2]


def copied(run_folder: Path, target: Path, **settings: Any) -> Path:
    """A finished run with these settings."""
    shutil.copytree(run_folder, target)
    (target / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(target), "seed": 0, **settings}, sort_keys=False))
    return target


def evaluation(folder: Path, rates: dict[str, float], given: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    found = {name: {"win_rate": rate, "ci": [rate - 5, rate + 5]} for name, rate in rates.items()}
    (folder / "results.json").write_text(json.dumps({"win_rates": found, "baseline": "sft", "given": given}))
    return folder


def report(*words: str | Path) -> dict[str, Any]:
    return run_report(ReportConfig.model_validate({"runs": [word for word in words if isinstance(word, Path)]}))


def test_a_run_has_its_evaluations_and_settings_on_its_page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copied(run_folder, tmp_path_factory.mktemp("runs") / "nca", objective={"name": "nca", "beta": 0.125})
    evaluation(run / "evaluation", {"nca": 62.5}, {"nca": str(run / "model")})
    assert report(run) == {"page": str(run / "report.html"), "runs": {"nca": "demo"}, "text": f"Report: {run / 'report.html'}"}
    page = (run / "report.html").read_text()
    assert "win rate against sft (%)" in page
    assert "62.50" in page
    assert re.search(r"objective\.beta<td[^>]*>0\.125", page)


def test_several_runs_are_overlaid_with_what_differs_and_how_they_were_judged(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("runs")
    monkeypatch.chdir(root)
    one = copied(run_folder, root / "a" / "nca", objective={"name": "nca", "beta": 0.125}, dtype="float32")
    two = copied(run_folder, root / "b" / "nca", objective={"name": "dpo", "beta": 0.25}, dtype="float32")
    (one / "model").mkdir()
    for run, name in ((one, "nca"), (two, "dpo")):
        rows = [{"step": step, "id": f"{step}", "prompt": "Oslo?", "completion": name if step else "no"} for step in (0, 9)]
        rows += [{"step": 9, "id": name, "prompt": f"{name}, Rome?", "completion": "one run alone"}]
        (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One is known by its folder, the other by its name, since only its answers were there.
    judged = evaluation(root / "judged", {"x": 62.5, "b/nca": 25.0, "other": 50.0}, {"x": str(one / "model")})
    assert report(one, two, judged)["runs"] == {"a/nca": "demo", "b/nca": "demo", "judged": "evaluation"}
    runs = [read_run(one, "a/nca"), read_run(two, "b/nca")]
    evaluated = evaluations_of(read_run(judged))
    table = runs_table(runs, evaluated)
    place = [column.name for column in table.columns].index("judged: win rate against sft (%)")
    assert [row[place] for row in table.rows] == [62.5, 25.0]
    assert [is_of(one_of_three, runs[0]) for one_of_three in evaluated] == [True, False, False]
    differing_settings = differing({run.name: run.settings for run in runs})
    assert differing_settings is not None
    assert differing_settings.rows == (("objective.name", "nca", "dpo"), ("objective.beta", "0.125", "0.25"))
    loss = overlaid(runs)[0]
    assert [(line.name, line.colour, line.dashed) for line in loss.series] == [
        ("a/nca", 0, False),
        ("a/nca, held out", 0, True),
        ("b/nca", 1, False),
        ("b/nca, held out", 1, True),
    ]
    page = (root / "report.html").read_text()
    assert re.search(r"<pre>Oslo\?</pre>\s*<td[^>]*><pre>nca</pre><td[^>]*><pre>dpo</pre>", page)
    assert "Rome" not in page
    # A method in each row, two columns of the comparison, and of each run its method, the comparison and the model as JSON.
    assert_shown_literally(page, times=10)
    # What is there is not replaced unasked, and a run's page that ncalign did not write never.
    with pytest.raises(ValueError, match=r"report\.html exists: --overwrite replaces it"):
        report(one, two)
    (one / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html is there, and no record"):
        report(one)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no folder of a run: it holds none of"),
        ({"seed-0/metrics.jsonl": ""}, r"name the runs in it \(seed-0\)"),
        ({"metrics.jsonl": '{"step": 1, "loss": 1}', "config.yaml": "a: ["}, r"config\.yaml can't be read"),
        ({"audit.json": '{"data": "d"}'}, "is of an earlier version, and can't be shown: audit again"),
        ({"rounds/000/x": "", "metrics.jsonl": '{"step": 1, "loss": 1}'}, "has no round that ended"),
        ({"results.json": "{}", "pairs.jsonl": '{"question": 1}'}, r"pairs\.jsonl:1 is damaged"),
    ],
)
def test_what_can_not_be_shown_is_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        report(tmp_path)
    with pytest.raises(ValueError, match="is given twice"):
        report(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        report(tmp_path / "none")


def test_damaged_results_are_named(run_folder: Path) -> None:
    (run_folder / "results.json").write_text('{"method": ')
    with pytest.raises(ValueError, match=r"results\.json is damaged \(.*rerun the verb"):
        write_report(run_folder)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics.jsonl has no logged steps"):
        write_report(tmp_path)


def test_all_text_of_an_online_run_is_escaped(run_folder: Path) -> None:
    folder = run_folder / "rounds" / "001"
    folder.mkdir(parents=True)
    candidates = [{"completion": EVIL, "reward": 1.0}, {"completion": [{"role": "assistant", "content": EVIL}], "reward": 0.5}]
    (folder / "pool.jsonl").write_text(json.dumps({"prompt": EVIL, "candidates": candidates}) + "\n")
    rounds: list[dict[str, Any]] = [
        {
            "round": number,
            "start": 4 * number - 4,
            "end": 4 * number,
            "health": {"reward/mean": 0.5},
            "drift": None,
            "alarms": [EVIL] * (number - 1),
            "counts": {"prompts": 8, "groups_trained_on": 7, "tokens": 64},
            "seconds": {"generate": 3.0, EVIL: 1.0},
        }
        for number in (1, 2)
    ]
    page = write_rounds_report(run_folder, rounds, {}, method=EVIL).read_text()
    # The method, an alarm, a phase in each round, a prompt and its best and worst completion; seven times in the results.
    assert_shown_literally(page, times=14)
    assert "online: 2 rounds, 8 steps" in page
    assert '<td class="n">4<td class="prose">' in page
    assert "generate 75%," in page
    assert page.count("<small>reward 0.5</small>") == 1


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'facts' is undefined"):
        render("run", name="a")

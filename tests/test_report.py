"""The report page: complete without a network, and safe whatever a model wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from ncalign.report.html import render
from ncalign.report.online_page import write_rounds_report
from ncalign.report.page import plot, read_metrics, write_report
from ncalign.training.run_folder import MetricsFile

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}</style></pre>'
ESCAPED = re.escape("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{ 7*7 }}{% raw %}&lt;/style&gt;&lt;/pre&gt;")


def assert_shown_literally(page: str, times: int) -> None:
    """What tries to break out of the page, or to be run by the template, stands there as text, this many times."""
    assert "<script" not in page
    assert "<img src=x" not in page
    assert (page.count("<style>"), page.count("</style>")) == (1, 1)
    assert page.count("<pre>") == page.count("</pre>")
    assert "49" not in re.sub(r'src="[^"]*"', "", page)
    assert len(re.findall(ESCAPED, page)) == times


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
    # Once as heading, once as the comparison's name, four times in the answers, and three times in the results at the end.
    assert_shown_literally(page, times=9)


def test_nothing_is_loaded_from_elsewhere(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    assert re.findall(r'src="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert "http" not in page


def test_figures_are_those_of_the_results(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    assert page.count("0.250 <small>[0.125, 0.500]</small>") == 3
    assert "<td>0.0625" in page


def test_only_logged_steps_are_plotted(run_folder: Path) -> None:
    rows = read_metrics(run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert plot(rows).startswith(b"\x89PNG")


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
    # The method, an alarm, a phase in each round, a prompt and its best and worst completion.
    assert_shown_literally(page, times=7)
    assert "online: 2 rounds, 8 steps" in page
    assert "4 s:" in page
    assert "generate 75%," in page
    assert page.count("<small>reward 0.5</small>") == 1


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'method' is undefined"):
        render("run", name="a")

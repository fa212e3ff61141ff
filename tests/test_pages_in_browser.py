"""Every kind of page in headless Chromium, wide and on a phone: nothing fails, is run or loaded; tables and charts work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ncalign.audit.audit import run_audit
from ncalign.audit.config import AuditConfig
from ncalign.cli.app import main
from ncalign.judging.config import EvaluateConfig
from ncalign.judging.evaluate import run_evaluate
from ncalign.lab.report import page as theory_page
from ncalign.lab.results import Curve, Statement
from ncalign.report.online_page import write_rounds_report
from ncalign.report.page import write_report
from ncalign.study.page import write_outputs
from server_double import ServerDouble, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
HOSTILE = '</script><script>window.hit=1</script><img src=x onerror="window.hit=1">\x1b[2J\u202e</style></pre>{{ 7*7 }}'
WRITTEN = r'</script><script>window.hit=1</script><img src=x onerror="window.hit=1">\x1b[2J\u202e</style></pre>{{ 7*7 }}'
WIDTHS = (1400, 390)
Open = Callable[[Path, int], Any]


def trained(folder: Path, *, beta: float, num_steps: int = 30) -> Path:
    """A finished run with held-out groups and answers."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": s, "loss": beta / s, "logps/chosen_change": -s * beta, "logps/rejected_change": -2.0 * s, HOSTILE: 1.0}
        for s in range(1, num_steps + 1)
    ]
    rows += [{"step": s, "eval/loss": 0.5 + 1 / (s + 1), "eval/rewards/accuracies": 0.5} for s in (0, num_steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured: dict[str, Any] = {name: 0.25 for name in ("before", "after", "difference")}
    measured |= {f"{name}_interval": [0.125, 0.5] for name in ("before", "after", "difference")} | {"p_value": 0.0625}
    answer = {
        "outcome": "better",
        "prompt": HOSTILE,
        "before": HOSTILE,
        "after": "6",
        "reward_before": 0.0,
        "reward_after": 1.0,
    }
    answers = [{**answer, "outcome": f"outcome {k}", "prompt": f"What is {k}? {HOSTILE}"} for k in range(8)]
    results = {"method": HOSTILE, "steps": num_steps, "comparison": {HOSTILE: measured}, "answers": answers, "seed": 0}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(json.dumps({"seed": 0, "objective": {"name": "nca", "beta": beta}, "data": HOSTILE}))
    asked = [(step, k) for step in (0, 10, 20, num_steps) for k in range(2)]
    sampled = [{"step": step, "id": f"{k}", "prompt": f"{k} {HOSTILE}", "completion": HOSTILE} for step, k in asked]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sampled))
    return write_report(folder)


def online(folder: Path) -> Path:
    trained(folder, beta=1.0)
    pool = folder / "rounds" / "001" / "pool.jsonl"
    pool.parent.mkdir(parents=True)
    candidates = [{"completion": HOSTILE, "reward": 1.0}, {"completion": "no", "reward": 0.5}]
    pool.write_text(json.dumps({"prompt": HOSTILE, "candidates": candidates}) + "\n")
    rounds = [
        {
            "round": number,
            "start": 4 * number - 4,
            "end": 4 * number,
            "health": {"reward/mean": 0.5 * number, "reward/best": 0.75, "completions/tokens": 12.0},
            "drift": {"kl": 0.1, "kl_interval": [0.05, 0.2], "preferred": 0.01, "preferred_interval": [None, None]},
            "alarms": [HOSTILE],
            "counts": {"prompts": 8, "groups_trained_on": 7, "tokens": 64},
            "seconds": {"generate": 3.0, HOSTILE: 1.0},
        }
        for number in (1, 2, 3)
    ]
    for row in rounds:
        path = folder / "rounds" / f"{int(row['round']) - 1:03d}" / "round.json"  # type: ignore[call-overload]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
    (folder / "rounds" / "002" / "pool.jsonl").write_text(pool.read_text())
    return write_rounds_report(folder, rounds, {"steps": [0, 4], "mean_reward": [0.25, 0.5]}, method=HOSTILE)


def prefers_good(body: dict[str, Any], number: int) -> str:
    """Prefers answers that say good, and what is shown first of the others; of some questions nothing can be read."""
    prompt = body["messages"][-1]["content"]
    first, second = re.findall(r"<answer_[ab] \w+>\n(.*?)\n</answer", prompt, flags=re.DOTALL)
    if "What is 3?" in prompt:
        return "I can't tell"
    return "[[A>>B]]" if "good" in first else "[[B>A]]" if "good" in second else "[[A>B]]"


def evaluation(folder: Path) -> Path:
    questions = folder.parent / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question_id": k, "turns": [f"What is {k}?"]}) + "\n" for k in range(24)))
    models = []
    for name, text in (("nca", "good"), ("sft", "bad"), (HOSTILE[:9].replace("/", ""), "poor")):
        path = folder.parent / f"answers-{len(models)}.jsonl"
        # Every fourth answer of a good model is no better than another's.
        said = [f"{text if k % 4 else 'so so'} {k} {'w ' * (k % 5)}{HOSTILE}" for k in range(24)]
        rows = [{"question": str(k), "model": name, "turns": [answer]} for k, answer in enumerate(said)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        models.append(str(path))
    games = [
        {"question": str(k), "model": "nca", "baseline": "sft", "model_first": first, "preference": float(k % 2)}
        for k in range(24)
        for first in (True, False)
    ]
    (folder.parent / "other-games.jsonl").write_text("".join(json.dumps(game) + "\n" for game in games))
    with serving(ServerDouble(prefers_good)) as url:
        settings = {
            "model": models[0],
            "against": models[1:],
            "set_name": str(questions),
            "judge": {"base_url": url, "mode": "labels", "attempts": 1},
            "output_dir": folder,
            "cache_dir": folder.parent / "cache",
            "compare_games": folder.parent / "other-games.jsonl",
            "num_resamples": 100,
        }
        run_evaluate(EvaluateConfig.model_validate(settings))
    return folder / "report.html"


def audited(folder: Path) -> Path:
    data = folder.parent / "groups.jsonl"
    rows = [
        {
            "id": f"{k} {HOSTILE}",
            "prompt": f"{HOSTILE} {k}",
            "candidates": [
                {"completion": f"a b c d e f g {k} {i} {HOSTILE}", "reward": float(i), "source": f"{HOSTILE}{i}"}
                for i in range(4)
            ],
        }
        for k in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_audit(AuditConfig(data=str(data), output_dir=folder))
    return folder / "audit.html"


def study(folder: Path) -> Path:
    rows = [{"arm": arm, "measure": "reward", "mean": 0.5, "interval": [0.25, 0.75]} for arm in ("a", HOSTILE)]
    claim = {"claim": HOSTILE, "mean": None, "num_seeds": 0, "verdict": "undecided", "why": HOSTILE}
    known = {
        "claim": "a > b",
        "mean": 0.5,
        "interval": [0.1, 0.9],
        "p_holm": 0.01,
        "num_seeds": 2,
        "verdict": "holds",
        "why": "",
    }
    found = {
        "study": HOSTILE,
        "claim": HOSTILE,
        "source": HOSTILE,
        "seeds": 1,
        "arm_settings": {"a": {}, HOSTILE: {}, "c": {}},
        "measures": ["reward"],
        "comparisons": [claim, known],
        "arms": rows,
        "failed": {"b/seed-0": HOSTILE},
    }
    trained(folder / "runs" / "a" / "seed-0", beta=1.0)
    return write_outputs(folder, found)


def theory(folder: Path) -> Path:
    folder.mkdir()
    statements = [Statement(f"{HOSTILE} {k}", HOSTILE, 0.0, k / 4, 0.5) for k in range(8)]
    lines = {"one": [(1.0, 1.0), (10.0, 0.1), (100.0, 0.01)], HOSTILE: [(0.0, 1.0), (2.0, -1.0), (4.0, 2.0)]}
    path = folder / "theory.html"
    path.write_text(theory_page(statements, [Curve("c", HOSTILE, HOSTILE, "y", lines, log="xy", note=HOSTILE)]))
    return path


def several(folder: Path) -> Path:
    folder.mkdir()
    runs = [folder / name for name in ("nca", "dpo", "third")]
    for k, run in enumerate(runs):
        trained(run, beta=0.1 * (k + 1))
    evaluation(folder / "evaluation")
    audited(folder / "audit")
    path = folder / "several.html"
    assert main(["report", *map(str, runs), str(folder / "evaluation"), str(folder / "audit"), "--output", str(path)]) == 0
    return path


PAGES: dict[str, Callable[[Path], Path]] = {
    "train": lambda folder: trained(folder, beta=1.0),
    "online": online,
    "evaluation": evaluation,
    "audit": audited,
    "study": study,
    "theory": theory,
    "several": several,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A page of each kind, made when it is first asked for."""
    pages: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in pages:
            pages[kind] = PAGES[kind](tmp_path_factory.mktemp(kind) / kind)
        return pages[kind]

    return make


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Any]]:
    with sync_api.sync_playwright() as playwright:
        contexts = {
            width: playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp(f"profile-{width}"),
                executable_path=CHROMIUM,
                headless=True,
                args=FLAGS.split(),
                viewport={"width": width, "height": 900},
                color_scheme="light" if width > 1000 else "dark",
            )
            for width in WIDTHS
        }
        yield contexts
        for context in contexts.values():
            context.close()


@pytest.fixture
def opened(browsers: dict[int, Any]) -> Iterator[Open]:
    """Opens a page; at the end nothing failed, nothing was run, and nothing was loaded from elsewhere."""
    told: list[str] = []
    loaded: list[str] = []
    pages: list[Any] = []

    def open_page(path: Path, width: int) -> Any:
        page = browsers[width].new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: loaded.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("[...document.querySelectorAll('details:not([open]) figure')].length >= 0")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.hit") is None
        page.close()
    assert told == []
    assert [url for url in loaded if not url.startswith("file:")] == []
    assert len(loaded) == len(pages)


def rows_of(table: Any, place: int) -> list[str]:
    """The cells of a column, in the rows that are shown."""
    rows = table.locator("tbody tr:visible").all()
    return [row.locator("td").nth(place).inner_text() for row in rows]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_fits_and_shows_hostile_text_as_text(kind: str, width: int, made: Callable[[str], Path], opened: Open) -> None:
    page = opened(made(kind), width)
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    for fold in page.locator("summary").all():
        fold.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.evaluate("document.body.textContent")
    assert WRITTEN in text
    assert not {"\x1b", "\u202e"} & set(page.content())
    assert page.locator("img").count() == 0
    assert page.locator("script:not([type='application/json'])").count() == 1
    figures = page.locator("figure.chart").all()
    assert figures
    for figure in figures:
        assert figure.locator("svg :is(path, circle, rect:not(.zoom))").count() > 0, figure.inner_text()
    # Wide tables scroll in boxes of their own.
    assert page.evaluate("[...document.querySelectorAll('table')].every((t) => t.closest('.wide').clientWidth <= innerWidth)")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) > 384) == (width > 1000)


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_sort_and_filter(width: int, made: Callable[[str], Path], opened: Open) -> None:
    page = opened(made("several"), width)
    table = page.locator("table.sorts").first
    head = table.locator("th").first
    for order in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert rows_of(table, 0) == sorted(["nca", "dpo", "third"], reverse=order == "descending")
    # Only one run was evaluated: what is missing stands last in either order.
    heads = [one.inner_text() for one in table.locator("th").all()]
    place = next(k for k, name in enumerate(heads) if "win rate against sft" in name)
    for _ in range(2):
        table.locator("th button").nth(place).click()
        assert rows_of(table, place)[1:] == ["–", "–"]
    audit = page.locator("h2", has_text="Audits").locator("xpath=following::table[1]")
    whole = audit.locator("tbody tr:visible").count()
    field = page.locator("h2", has_text="Audits").locator("xpath=following::input[1]")
    field.fill("LENGTH agree")
    assert rows_of(audit, 0) == ["length/agreement"]
    assert page.locator("small[role=status]:visible").last.inner_text() == f"1 of {whole} rows"
    field.fill("")
    assert audit.locator("tbody tr:visible").count() == whole > 10


def test_answers_sort_and_filter_on_a_wide_page(made: Callable[[str], Path], opened: Open) -> None:
    page = opened(made("train"), 1400)
    table = page.locator("h2", has_text="Answers side by side").locator("xpath=following::table[1]")
    table.locator("th button", has_text="outcome").click()
    table.locator("th button", has_text="outcome").click()
    assert rows_of(table, 0) == [f"outcome {k}" for k in reversed(range(8))]
    page.locator("h2", has_text="Answers side by side").locator("xpath=following::input[1]").fill("What is 3?")
    assert rows_of(table, 0) == ["outcome 3"]


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_show_values_zoom_and_hide_lines(width: int, made: Callable[[str], Path], opened: Open) -> None:
    page = opened(made("train"), width)
    figure = page.locator("figure.chart").first
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] - 14, middle)
    tip = figure.locator(".tip")
    assert tip.is_visible()
    # 1/30 and 1/2 + 1/31, at the last step.
    assert tip.inner_text().split("\n") == ["step: 30", "loss: 0.03333", "held out: 0.5323"]
    points = figure.locator("circle").count()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
    page.mouse.up()
    assert 0 < figure.locator("circle").count() < points
    # Charts of the same steps are zoomed together.
    assert page.locator("figure.chart").nth(1).locator("button.back").is_visible()
    figure.locator("svg").dblclick()
    assert figure.locator("circle").count() == points
    assert figure.locator("button.back").is_hidden()
    figure.locator(".legend button").first.click()
    assert figure.locator(".legend button").first.get_attribute("aria-pressed") == "false"
    assert figure.locator("circle").count() == 2
    page.emulate_media(media="print")
    assert page.locator(".tools:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_judges_that_disagree_come_first(made: Callable[[str], Path], opened: Open) -> None:
    page = opened(made("evaluation"), 1400)
    table = page.locator("h2", has_text="Answers to read").locator("xpath=following::table[1]")
    outcomes = rows_of(table, 0)
    order = ["judges disagree", "the judge's orders disagree", "no verdict"]
    ranks = [order.index(one) if one in order else 3 for one in outcomes]
    assert set(ranks) == {0, 1, 2, 3}
    assert ranks == sorted(ranks)
    # Every dash of a table says why: those of pairs in the paragraph above them.
    dashes = page.locator("table:not(.cards) td", has_text=re.compile("^–$"))
    assert dashes.count() > 0
    assert all(one.get_attribute("title") for one in dashes.all())

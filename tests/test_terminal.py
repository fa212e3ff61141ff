"""Text from data, servers, models and file names never steers the terminal, whichever way it is printed."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ncalign.cli import app as cli
from ncalign.core.progress import Bar, say
from ncalign.report.html import write_run_page
from ncalign.training.config import TrainConfig

FOREIGN = "\x1b]0;OWNED\x07\x1b[2J\x9b31m\x7f\r\x00\u202egnp.exe\u2066\u2028\ud800"
WRITTEN = r"\x1b]0;OWNED\x07\x1b[2J\x9b31m\x7f\x0d\x00\u202egnp.exe\u2066\u2028\ud800"
TRAIN = ["train", "--model", "m", "--data", "d.jsonl", "--output_dir", "runs/x"]


def fail() -> None:
    raise ValueError(FOREIGN)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line with a function in the place of training."""

    def _run(work: Callable[[], object], *flags: str) -> int:
        train = ModuleType("ncalign.training.train")

        def run_training(_config: TrainConfig) -> object:
            return work()

        train.run_training = run_training  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, train.__name__, train)
        return cli.main([*TRAIN, *flags])

    return _run


def log_a_failure() -> None:
    try:
        fail()
    except ValueError:
        logging.getLogger("some.library").exception("%s", FOREIGN)


def warn() -> None:
    # What Python prints of a warning; pytest keeps warnings to itself.
    print(warnings.formatwarning(FOREIGN, UserWarning, "model.py", 1), file=sys.stderr)


def fail_in_a_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def fail_as_a_bug() -> None:
    raise KeyError(FOREIGN)


def draw_a_bar() -> None:
    with Bar(f"Encoding {FOREIGN}", 1) as bar:
        bar.advance()


WAYS = {
    "an error": (fail, 1),
    "an error with its traceback": (fail, 1, "--debug"),
    "a bug": (fail_as_a_bug, 1),
    "a notice": (lambda: say(FOREIGN) or {}, 0),
    "a bar": (lambda: draw_a_bar() or {}, 0),
    "a library's print": (lambda: print(FOREIGN) or {}, 0),
    "a library's log": (lambda: log_a_failure() or {}, 0),
    "a library's warning": (lambda: warn() or {}, 0),
    "a thread's traceback": (lambda: fail_in_a_thread() or {}, 0),
    "a result": (lambda: {"model": FOREIGN, "names": [FOREIGN], FOREIGN: 1.0}, 0),
    "a result's text": (lambda: {"text": FOREIGN}, 0),
    "a flag": (lambda: {}, 2, "--seed", FOREIGN.replace("\x00", "")),
    "a flag's name": (lambda: {}, 2, "--" + FOREIGN.replace("\x00", ""), "1"),
}


@pytest.mark.parametrize("way", WAYS)
def test_control_characters_are_written_out(way: str, run: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    work, code, *flags = WAYS[way]
    handler = logging.StreamHandler()
    logging.getLogger("some.library").addHandler(handler)
    try:
        assert run(work, *flags) == code
    finally:
        logging.getLogger("some.library").removeHandler(handler)
    printed = "".join(capfd.readouterr())
    assert r"\x1b]0;OWNED\x07" in printed
    steering = {letter for letter in FOREIGN if not letter.isprintable()}
    assert not steering & set(printed)


def test_every_steering_character_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{FOREIGN} kept\nas [red]they[/red] are")
    assert capsys.readouterr().err == f"{WRITTEN} kept\nas [red]they[/red] are\n"


def test_json_is_escaped_as_json_is(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: {"model": FOREIGN}, "--json") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"model": FOREIGN}
    assert printed.rstrip("\n").isprintable()


def test_pages_show_letters_in_the_order_they_were_written(tmp_path: Path) -> None:
    page = write_run_page(tmp_path, "theory", summary=f"<b>{FOREIGN}", statements=[], curves=[], charts={}).read_text(
        encoding="utf-8"
    )
    assert f"&lt;b&gt;{WRITTEN}" in page

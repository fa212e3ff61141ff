"""Foreign code that has to end: chat templates that loop are stopped with words, in threads and worker processes too."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_tokenizer
from ncalign.cli.app import main
from ncalign.core.deadline import within
from ncalign.core.parallel import map_chunks
from ncalign.data.groups import Candidate, Group
from ncalign.model import chat
from ncalign.model.chat import ChatTemplate, EndlessTemplateError
from ncalign.model.encoding import Encoder

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ASKED = [{"role": "user", "content": "12?"}]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.5)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def spin() -> None:
    while True:
        pass


def late(_items: list[int]) -> str:
    with pytest.raises(TimeoutError):
        within(0.3, spin)
    return within(5, lambda: "in time")


def test_what_ends_in_time_is_returned_or_raised() -> None:
    assert within(5, lambda: 12) == 12
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    assert within(5, lambda: within(5, lambda: 12)) == 12


@pytest.mark.parametrize("where", ["here", "a thread", "a worker process"])
def test_what_does_not_end_is_stopped(where: str) -> None:
    found: list[str] = []
    if where == "here":
        found = [late([])]
    elif where == "a thread":
        thread = threading.Thread(target=lambda: found.append(late([])))
        thread.start()
        thread.join()
    else:
        # This process counts for a thread of its own as it forks.
        within(5, lambda: found.extend(map_chunks(late, [1], workers=2, size=1, alone=0)))
    assert found == ["in time"]


def test_a_template_that_catches_nothing_is_stopped_and_the_next_is_read() -> None:
    with pytest.raises(EndlessTemplateError, match=r"takes more than 0\.5 s for one conversation: it may never end; put one"):
        ChatTemplate(tokenizer_with(LOOP)).render(ASKED)
    assert "12?" in ChatTemplate(tokenizer_with(CHATML)).render(ASKED)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MOST_CHARACTERS", 1000)
    with pytest.raises(EndlessTemplateError, match="writes 2,000 characters for one conversation"):
        ChatTemplate(tokenizer_with("{{ 'x' * 2000 }}")).render(ASKED)
    with pytest.raises(EndlessTemplateError, match="takes more memory than there is"):
        ChatTemplate(tokenizer_with("{{ 'x' * (2 ** 62) }}")).render(ASKED)


def test_no_row_is_left_out_for_a_template_that_loops_on_its_text() -> None:
    tokenizer = tokenizer_with("{% if '12?' in messages[0].content %}" + LOOP + "{% endif %}" + CHATML)
    encoder = Encoder(tokenizer)
    with pytest.raises(EndlessTemplateError):
        encoder.encode(Group("g", ASKED, [Candidate("12")]))
    assert not encoder.report.dropped


@pytest.mark.parametrize("verb", ["check", "generate"])
def test_verbs_end_with_words(
    verb: str, write_jsonl: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([{"id": "g", "prompt": ASKED, "candidates": [{"completion": "12", "reward": 1.0}]}])
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "chat_template.jinja").write_text(LOOP + CHATML)
    arguments = {"check": [str(data)], "generate": ["--prompts", str(data), "--output", str(tmp_path / "o.jsonl")]}
    assert main([verb, *arguments[verb], "--model", str(model)]) == 1
    assert f"put one that does into {json.dumps(str(model))[1:-1]!r}" in capsys.readouterr().err

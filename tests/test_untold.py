"""What a row holds for the chat template, and the template leaves out, is told by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_tokenizer
from ncalign.cli.app import main
from ncalign.data.groups import Candidate, Group
from ncalign.model.encoding import DroppedGroupError, Encoder

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I look."},
    {"role": "tool", "content": "3 C", "tool_call_id": "1", "name": "weather"},
]
CALLS = "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
THOUGHTS = "{% if message.reasoning_content %}{{ message.reasoning_content }}{% endif %}"


def group(prompt: list[dict[str, Any]] = TURNS, **more: Any) -> Group:
    return Group("g", prompt, [Candidate([{"role": "assistant", "content": "3", **more}], 1.0)])


def tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose template writes more of each message after its text."""
    found = build_tokenizer()
    found.chat_template = CHATML.replace("{% endfor %}", "".join(added) + "{% endfor %}")
    return found


@pytest.mark.parametrize(
    ("added", "left_out"),
    [
        ((), ["tool_calls", "reasoning_content"]),
        ((CALLS,), ["reasoning_content"]),
        ((CALLS, THOUGHTS), []),
    ],
)
def test_what_the_template_leaves_out_is_named(added: tuple[str, ...], left_out: list[str]) -> None:
    encoder = Encoder(tokenizer(*added), max_length=512)
    encoder.encode(group())
    encoder.encode(group([{"role": "user", "content": "Weather?"}]))
    assert dict(encoder.report.untold) == dict.fromkeys(left_out, 1)
    notices = [notice for notice in encoder.report.notices() if "leaves out" in notice]
    assert all(f"`{name}` (1 groups)" in notice for notice in notices for name in left_out)
    assert len(notices) == bool(left_out)


def test_thoughts_beside_an_answer_are_named() -> None:
    encoder = Encoder(tokenizer(), max_length=512)
    encoder.encode(group([{"role": "user", "content": "Weather?"}], reasoning_content="I look."))
    assert dict(encoder.report.untold) == {"reasoning_content of answers": 1}
    shown = Encoder(tokenizer(THOUGHTS), max_length=512)
    shown.encode(group([{"role": "user", "content": "Weather?"}], reasoning_content="I look."))
    assert not shown.report.untold


def test_calls_in_an_answer_that_are_left_out_are_refused_by_name() -> None:
    encoder = Encoder(tokenizer(), max_length=512)
    with pytest.raises(DroppedGroupError, match="leaves out `tool_calls` of turn 4, which is the assistant's"):
        encoder.encode(group(tool_calls=[CALL]))
    assert encoder.report.dropped.total() == 1


def test_a_template_that_takes_no_question_alone_is_not_asked_twice() -> None:
    refuses = "{% if messages[-1].role == 'tool' and not add_generation_prompt %}{{ raise_exception('answer it') }}{% endif %}"
    found = tokenizer(CALLS)
    found.chat_template = refuses + str(found.chat_template)
    encoder = Encoder(found, max_length=512)
    encoder.encode(group())
    assert not encoder.report.untold


def test_check_names_it(tiny_model_dir: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([{"prompt": TURNS, "chosen": "3", "rejected": "4"}])
    main(["check", str(data), "--model", str(tiny_model_dir), "--max_length", "256"])
    assert "the chat template leaves out `tool_calls` (1 groups), `reasoning_content` (1 groups)" in capsys.readouterr().out


TOOL = {"type": "function", "function": {"name": "weather_report", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("prompt", ["Oslo?", [{"role": "user", "content": "Oslo?"}]], ids=["text", "turns"])
@pytest.mark.parametrize("writes", [True, False])
def test_tools_reach_the_template_or_are_named(writes: bool, prompt: Any) -> None:
    found = tokenizer()
    if writes:
        found.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + str(found.chat_template)
    encoder = Encoder(found, max_length=512)
    encoded = encoder.encode(Group("g", prompt, [Candidate("3", 1.0)], {"tools": [TOOL]}))
    assert ("weather_report" in found.decode(encoded.prompt)) == writes
    assert dict(encoder.report.untold) == ({} if writes else {"tools": 1})


def test_what_is_left_out_is_looked_for_on_the_run_s_day() -> None:
    found = tokenizer()
    writes = "{% if tools and strftime_now('%Y') == '2020' %}{{ tools | tojson }}{% endif %}"
    found.chat_template = writes + str(found.chat_template)
    encoder = Encoder(found, max_length=512, today=date(2020, 1, 2))
    encoder.encode(Group("g", "Oslo?", [Candidate("3", 1.0)], {"tools": [TOOL]}))
    assert not encoder.report.untold


def test_tools_of_plain_text_are_named() -> None:
    encoder = Encoder(tokenizer(), max_length=512, string_prompts="raw")
    encoder.encode(Group("g", "Oslo?", [Candidate(" 3", 1.0)], {"tools": [TOOL]}))
    assert dict(encoder.report.untold) == {"tools of plain text": 1}

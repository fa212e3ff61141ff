"""`ncalign chat`: its answers are those that our own sampler gives to the same conversation; what ends it, what not."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import build_model
from ncalign.cli import app
from ncalign.cli.app import main
from ncalign.core.terminal import TalkStream, visible
from ncalign.generation.base import SamplingParams
from ncalign.generation.local import TransformersGenerator, load_for_generation

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GREEDY = ("--temperature", "0", "--max_new_tokens", "12")
Turns = list[dict[str, Any]]
_SILENCE_SECONDS = 120.0
"""After which a program that says nothing has failed."""


@pytest.fixture
def other_dir(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """Another model of the same make."""
    folder = tmp_path / "other"
    build_model(tiny_tokenizer, seed=5).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Types lines through a pipe; the exit code, and what was printed on both streams."""

    def run(typed: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main(["chat", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def talked(chat: Callable[..., Any], typed: str, *words: object) -> Turns:
    code, out, err = chat(typed, *words, "--json")
    assert code == 0, err
    turns: Turns = json.loads(out)["turns"]
    return turns


def texts(turns: Turns) -> list[str]:
    return [answer["text"] for turn in turns for answer in turn["answers"]]


def expected(folder: Path, messages: Any, num_tokens: int = 12) -> str:
    """The greedy answer of our own sampler, which streams nothing."""
    model, tokenizer = load_for_generation(str(folder), dtype="float32", trust_remote_code=False)
    generator = TransformersGenerator(model, tokenizer, progress=False)
    ((found,),) = generator.generate([messages], num_samples=1, params=SamplingParams(num_tokens, temperature=0.0), seed=0)
    return found.text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_answers_are_the_samplers_and_the_conversation_goes_on(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    first, second = texts(talked(chat, "What is 7?\nAnd 8?\n", tiny_model_dir, *GREEDY))
    assert first == expected(tiny_model_dir, [user("What is 7?")])
    assert second == expected(tiny_model_dir, [user("What is 7?"), assistant(first), user("And 8?")])
    assert second != expected(tiny_model_dir, [user("And 8?")])


def test_a_pipe_gets_the_answers_alone(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    code, out, _ = chat("What is 7?\n\n  \n", tiny_model_dir, *GREEDY)
    answer = expected(tiny_model_dir, [user("What is 7?")])
    assert (code, out) == (0, f"{visible(answer)} [cut after 12 tokens]\n")


def test_reset_and_exit(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    turns = talked(chat, "What is 7?\nAnd 8?\n/reset\nWhat is 7?\n/exit\nWhat is 9?\n", tiny_model_dir, *GREEDY)
    assert [turn["typed"] for turn in turns] == ["What is 7?", "And 8?", "What is 7?"]
    assert texts(turns)[0] == texts(turns)[2]


def test_a_system_prompt_comes_first_and_survives_a_reset(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    turns = talked(chat, "What is 7?\n/reset\nWhat is 7?\n", tiny_model_dir, *GREEDY, "--system", "Reply, please.")
    answer = expected(tiny_model_dir, [{"role": "system", "content": "Reply, please."}, user("What is 7?")])
    assert texts(turns) == [answer, answer]
    assert answer != expected(tiny_model_dir, [user("What is 7?")])


def test_two_models_answer_each_from_its_own_conversation(
    chat: Callable[..., Any], tiny_model_dir: Path, other_dir: Path
) -> None:
    words = (tiny_model_dir, "--against", other_dir, *GREEDY)
    one, other, one_more, other_more = texts(talked(chat, "What is 7?\nAnd 8?\n", *words))
    for folder, first, second in ((tiny_model_dir, one, one_more), (other_dir, other, other_more)):
        assert first == expected(folder, [user("What is 7?")])
        assert second == expected(folder, [user("What is 7?"), assistant(first), user("And 8?")])
    assert one != other
    code, out, _ = chat("What is 7?\n", *words)
    width = len(tiny_model_dir.name)
    assert (code, out) == (
        0,
        f"{tiny_model_dir.name}> {visible(one)} [cut after 12 tokens]\n"
        f"{'other':>{width}}> {visible(other)} [cut after 12 tokens]\n",
    )


def test_a_run_folder_and_its_adapter(chat: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    run = tmp_path / "first"
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    adapted.save_pretrained(run / "model")
    code, out, err = chat("What is 7?\n", run, *GREEDY, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["models"] == {"first": str(run / "model")}
    assert texts(found["turns"]) == [expected(run / "model", [user("What is 7?")])]
    assert texts(found["turns"]) != [expected(tiny_model_dir, [user("What is 7?")])]
    assert texts(talked(chat, "What is 7?\n", run / "model", *GREEDY)) == texts(found["turns"])


def test_sampling_depends_on_the_seed_alone(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    words = (tiny_model_dir, "--temperature", "1", "--max_new_tokens", "12", "--seed")
    state = torch.random.get_rng_state()
    first = texts(talked(chat, "What is 7?\n", *words, 3))
    assert texts(talked(chat, "What is 7?\n", *words, 3)) == first
    assert texts(talked(chat, "What is 7?\n", *words, 4)) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_models_own_sampling_settings_are_not_used(chat: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    changed = tmp_path / "changed"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(changed)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(changed)
    words = ("What is 7?\n", changed, "--temperature", "0", "--max_new_tokens", "40")
    assert texts(talked(chat, *words)) == [expected(tiny_model_dir, [user("What is 7?")], 40)]


def test_an_answer_that_the_model_ends_is_whole(chat: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "ending"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        # Whatever was said, the end token has the largest logit: the others are 0.
        model.model.norm.weight.zero_()
    model.lm_head.bias = None
    model.save_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    # All logits are equal: greedy takes token 0, which ends the answer.
    (turn,) = talked(chat, "What is 7?\n", folder, *GREEDY)
    assert turn["answers"] == [{"model": "ending", "text": "", "tokens": 1, "finished": True, "stopped": False}]


# --- Rewards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reward(tmp_path: Path) -> str:
    file = tmp_path / "rewards.py"
    file.write_text(
        "def length(prompt, completions):\n    return [float(len(text)) for text in completions]\n", encoding="utf-8"
    )
    return f"{file}:length"


def test_rewards_are_shown_below(chat: Callable[..., Any], tiny_model_dir: Path, other_dir: Path, reward: str) -> None:
    one, other = (expected(folder, [user("What is 7?")]) for folder in (tiny_model_dir, other_dir))
    code, out, _ = chat("What is 7?\n", tiny_model_dir, *GREEDY, "--reward", reward)
    assert (code, out) == (0, f"{visible(one)} [cut after 12 tokens]\n[reward {len(one)}]\n")
    words = (tiny_model_dir, "--against", other_dir, *GREEDY, "--reward", reward)
    assert f"[reward {tiny_model_dir.name} {len(one)}, other {len(other)}]\n" in chat("What is 7?\n", *words)[1]
    turns = talked(chat, "What is 7?\nAnd 8?\n", *words)
    assert [answer["reward"] for turn in turns for answer in turn["answers"]] == [float(len(text)) for text in texts(turns)]


def test_a_reward_that_fails_is_told_and_the_talk_goes_on(
    chat: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "broken.py").write_text("def broken(prompt, completions):\n    raise ValueError('no result is known')\n")
    words = (tiny_model_dir, *GREEDY, "--reward", f"{tmp_path / 'broken.py'}:broken")
    code, out, _ = chat("What is 7?\nAnd 8?\n", *words)
    assert (code, out.count("[no reward: "), out.count("no result is known")) == (0, 2, 2)
    assert [answer["reward"] for turn in talked(chat, "What is 7?\n", *words) for answer in turn["answers"]] == [None]


# --- Plain text ------------------------------------------------------------------------------------------------------


def test_a_model_without_a_chat_template_goes_on_with_the_text(
    chat: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path
) -> None:
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    code, out, err = chat("What is 7?\nAnd 8?\n", folder, *GREEDY, "--json")
    assert code == 0
    assert "note: base has no chat template" in err
    first, second = texts(json.loads(out)["turns"])
    assert first == expected(folder, "What is 7?")
    assert second == expected(folder, f"What is 7?{first}\nAnd 8?")


# --- What can't be answered ------------------------------------------------------------------------------------------


def test_a_conversation_longer_than_the_context_is_refused(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    code, out, err = chat("What is 7? " * 200 + "\nAnd 8?\n", tiny_model_dir, *GREEDY)
    assert (code, out) == (1, "")
    assert "has a context of 512: /reset begins anew" in err


def test_bad_usage(chat: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    for words, code, message in (
        ((), 2, "model"),
        ((tiny_model_dir, "--temperature", "-1"), 2, "--temperature"),
        ((tiny_model_dir, "--judge"), 2, "the section judge goes with reward: judge"),
        ((tiny_model_dir, "--against", tiny_model_dir), 1, "give two models, or leave against out"),
        ((tmp_path, *GREEDY), 1, "has no config.json"),
        ((tiny_model_dir, "--chat_template_kwargs", "thinking=true"), 1, "does not read `thinking`"),
        ((tiny_model_dir, "--reward", tmp_path / "none.py:f"), 1, "none.py"),
    ):
        found, out, err = chat("What is 7?\n", *words)
        assert (found, out, message in err) == (code, "", True), (words, err)
    code, out, err = chat("/forget it\n", tiny_model_dir, *GREEDY)
    assert (code, out) == (1, "")
    assert "unknown command '/forget': there are /reset, /exit and /help" in err


def test_a_text_may_begin_with_a_slash_after_a_space(chat: Callable[..., Any], tiny_model_dir: Path) -> None:
    assert texts(talked(chat, " /etc?\n", tiny_model_dir, *GREEDY)) == [expected(tiny_model_dir, [user(" /etc?")])]


def test_nothing_that_a_model_writes_steers_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    TalkStream().write("\x1b[2J\u202egnp")
    assert stream.getvalue() == "\\x1b[2J\\u202egnp"


def test_a_reader_that_has_gone_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(app, "_drop_stdout", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7?\n"))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Closed())
        assert main(["chat", str(tiny_model_dir), *GREEDY]) == 141
    assert "error" not in capsys.readouterr().err


# --- Ctrl-C and Ctrl-D -----------------------------------------------------------------------------------------------


class Pressing(io.StringIO):
    """A terminal at which someone presses Ctrl-C (or sends a signal) when a piece of an answer appears."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number, self.pressed = number, False

    def write(self, text: str) -> int:
        written = super().write(text)
        if text and not self.pressed:
            self.pressed = True
            signal.raise_signal(self._number)
        return written


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, chat: Callable[..., Any]
) -> None:
    terminal = Pressing(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        patched.setattr(sys, "stdin", io.StringIO("What is 7?\nAnd 8?\n"))
        assert main(["chat", str(tiny_model_dir), "--temperature", "0", "--max_new_tokens", "300"]) == 0
    assert terminal.pressed
    stopped, _, rest = terminal.getvalue().partition(" [stopped]\n")
    assert rest
    whole = visible(expected(tiny_model_dir, [user("What is 7?")], 300))
    assert whole.startswith(stopped)
    assert 0 < len(stopped) < len(whole)


def test_sigterm_ends_it(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Pressing(signal.SIGTERM))
        patched.setattr(sys, "stdin", io.StringIO("What is 7?\nAnd 8?\n"))
        assert main(["chat", str(tiny_model_dir), *GREEDY]) == 143
    assert "interrupted; the conversation is not kept" in capsys.readouterr().err


def test_ctrl_c_ends_nothing_where_nothing_is_answered(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[type[BaseException] | str] = [KeyboardInterrupt, "What is 7?", KeyboardInterrupt, EOFError]

    def type_in(prompt: str) -> str:
        found = typed.pop(0)
        if isinstance(found, str):
            return found
        raise found

    keyboard = io.StringIO()
    monkeypatch.setattr(keyboard, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr("builtins.input", type_in)
    assert main(["chat", str(tiny_model_dir), *GREEDY]) == 0
    out = capsys.readouterr().out
    assert out.count("\n(/exit or Ctrl-D ends)\n") == 2
    assert f"{tiny_model_dir.name}> {visible(expected(tiny_model_dir, [user('What is 7?')]))} [cut" in out
    assert typed == []


@pytest.fixture
def terminal(tmp_path: Path, tiny_model_dir: Path) -> Iterator[Callable[..., str]]:
    """``terminal(("expected", b"sent"), ...)``: sends keys when a text has appeared; gives all that was shown."""
    if not hasattr(os, "openpty"):
        pytest.skip("there are no terminals of this kind")
    started: list[subprocess.Popen[bytes]] = []

    def run(*steps: tuple[str, bytes]) -> str:
        command = [sys.executable, "-m", "ncalign", "chat", str(tiny_model_dir), *GREEDY, "--dtype", "float32"]
        master, slave = os.openpty()
        # The first terminal that a session opens is the one whose Ctrl-C it gets.
        opening = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave)]
        process = subprocess.Popen([*opening, *command], start_new_session=True, env={**os.environ, "TERM": "dumb"})
        started.append(process)
        shown, after, remaining, unread = "", 0, list(steps), b""
        while select.select([master], [], [], _SILENCE_SECONDS)[0]:
            try:
                unread += os.read(master, 4096)
            except OSError:  # Linux's way of saying that all who could write have gone
                break
            if slave >= 0:
                os.close(slave)  # the program has opened its own
                slave = -1
            shown = unread.decode("utf-8", "replace")
            while remaining and remaining[0][0] in shown[after:]:
                text, keys = remaining.pop(0)
                after = shown.index(text, after) + len(text)
                os.write(master, keys)
        os.close(master)
        assert not remaining, shown
        assert process.wait(_SILENCE_SECONDS) == 0, shown
        return shown

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_a_terminal(terminal: Callable[..., str], tiny_model_dir: Path) -> None:
    """A wrong command, an answer, a command, and Ctrl-D."""
    shown = terminal(
        ("you> ", b"/nothing\n"),
        ("error: unknown command '/nothing'", b""),
        ("you> ", b"What is 7?\n"),
        ("[cut after 12 tokens]", b""),
        ("you> ", b"/reset\n"),
        ("the conversation begins anew", b""),
        ("you> ", b"\x04"),
    )
    assert f"{tiny_model_dir.name}> {visible(expected(tiny_model_dir, [user('What is 7?')]))} [cut" in shown.replace(
        "\r\n", "\n"
    )

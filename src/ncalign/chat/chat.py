"""`ncalign chat`: lines in, answers out, from a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

from ncalign.chat.config import ChatConfig
from ncalign.chat.speaker import Answer, Speaker
from ncalign.core.progress import say
from ncalign.core.terminal import TalkStream
from ncalign.data.groups import Candidate, Group
from ncalign.generation.base import SamplingParams
from ncalign.generation.local import load_for_generation
from ncalign.model.chat import ChatTemplate, template_date
from ncalign.model.config import Precision, template_kwargs
from ncalign.model.precision import resolve_dtype
from ncalign.model.runs import model_of
from ncalign.report.tables import model_name
from ncalign.rewards.base import RewardSource
from ncalign.rewards.config import RewardConfig
from ncalign.rewards.sources import reward_dtype, reward_source

_YOU = "you> "
_HELP = """\
/reset  forget the conversation so far
/exit   end; Ctrl-D does the same
/help   this text
Ctrl-C stops an answer. A line that is to begin with a slash needs a space before it.
"""


def run_chat(config: ChatConfig) -> dict[str, object]:
    """Answer the lines of standard input until it ends or ``/exit`` is read.

    Returns:
        ``models`` by their names, and ``turns``: what was typed, and each model's answer with its reward; an empty ``text``,
        since all was said.

    Raises:
        ValueError: a model can't be loaded; or, where lines come through a pipe, one can't be answered.
    """
    source = _rewards_of(config)
    names = _names([config.model, *([config.against] if config.against is not None else [])])
    dtype = resolve_dtype(config.dtype)
    speakers = [_speaker(config, name, model, dtype) for name, model in names.items()]
    chat = Chat(speakers, source, seed=config.seed)
    chat.run()
    return {"models": names, "turns": chat.turns, "text": ""}


def _names(models: Sequence[str]) -> dict[str, str]:
    """What models are called, and their folders or hub ids: by their runs' or folders' names, whole where two have the same."""
    meant = [model_of(model) for model in models]
    short = [model_name(model) for model in meant]
    names = short if len(set(short)) == len(short) else [str(model) for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"model and against are both {models[0]}: give two models, or leave against out")
    return dict(zip(names, meant, strict=True))


def _rewards_of(config: ChatConfig) -> RewardSource | None:
    if not config.reward:
        return None
    rewards = RewardConfig(reward=config.reward, judge=config.judge)
    return reward_source(
        rewards,
        dtype=reward_dtype(rewards, config.dtype),
        trust_remote_code=config.trust_remote_code,
        today=config.template_date,
    )


def _speaker(config: ChatConfig, name: str, model: str, dtype: Precision) -> Speaker:
    loaded, tokenizer = load_for_generation(model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    today: date | None = template_date(tokenizer, config.template_date)
    speaker = Speaker(
        name,
        loaded,
        tokenizer,
        template=ChatTemplate(tokenizer, today, template_kwargs(config.chat_template_kwargs)),
        params=SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k),
        system=config.system,
        control_tokens=config.control_tokens_in_text,
    )
    if speaker.plain:
        say(f"note: {name} has no chat template: it goes on with the text of the conversation, as a base model does")
    return speaker


class Chat:
    """A conversation with one or two models.

    Args:
        speakers: the models.
        source: gives the answers' rewards; None for none.
        seed: of the first answer.

    Attributes:
        turns: what was typed and answered.
    """

    def __init__(self, speakers: Sequence[Speaker], source: RewardSource | None, *, seed: int) -> None:
        self._speakers, self._source, self._seed = speakers, source, seed
        self._out, self._on_terminal = TalkStream(), sys.stdin.isatty()
        self._width = max(len(speaker.name) for speaker in speakers)
        self.turns: list[dict[str, Any]] = []

    def run(self) -> None:
        """Read and answer until the end.

        Raises:
            ValueError: a line from a pipe can't be answered; to a terminal it is told, and the conversation goes on.
        """
        if self._on_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited)
            self._out.write(f"{', '.join(speaker.name for speaker in self._speakers)}: /help lists what can be typed\n")
        while (line := self._read()) is not None:
            command = line.strip()
            if command == "/exit":
                break
            if not command:
                continue
            try:
                if line.startswith("/"):
                    self._obey(command)
                else:
                    self._answer(line)
            except ValueError as error:
                if not self._on_terminal:
                    raise
                self._out.write(f"error: {error}\n")

    def _obey(self, command: str) -> None:
        if command == "/reset":
            for speaker in self._speakers:
                speaker.reset()
            if self._on_terminal:
                self._out.write("the conversation begins anew\n")
        elif command == "/help":
            self._out.write(_HELP)
        else:
            raise ValueError(
                f"unknown command {command.split()[0]!r}: there are /reset, /exit and /help; a space before it makes it a text"
            )

    def _read(self) -> str | None:
        """The next line; None at the end."""
        while True:
            try:
                if not self._on_terminal:
                    line = sys.stdin.readline()
                    return line.rstrip("\r\n") if line else None
                # Lines are edited where `input` writes to the terminal itself.
                with contextlib.redirect_stdout(self._out.stream):
                    return input(_YOU)
            except UnicodeDecodeError as error:
                raise ValueError(f"what was read is not UTF-8 ({error.reason}): convert it") from None
            except EOFError:
                self._out.write("\n")
                return None
            except KeyboardInterrupt as interruption:
                if type(interruption) is not KeyboardInterrupt or not self._on_terminal:
                    raise
                self._out.write("\n(/exit or Ctrl-D ends)\n")

    def _answer(self, line: str) -> None:
        """Have each model answer, show the answers as they are written, and their rewards below."""
        answers: list[Answer] = []
        for speaker in self._speakers:
            if self._on_terminal or len(self._speakers) > 1:
                self._out.write(f"{speaker.name:>{self._width}}> ")
            answer = speaker.answer(line, seed=self._seed + len(self.turns), show=self._out.write)
            self._out.write(f"{self._note(answer)}\n")
            answers.append(answer)
            if answer.stopped:
                break
        rewards, why = self._rewards(answers)
        if rewards:
            shown = ["none" if reward is None else f"{reward:.4g}" for reward in rewards]
            named = [f"{speaker.name} {text}" for speaker, text in zip(self._speakers, shown, strict=False)]
            self._out.write(f"[reward {', '.join(named) if len(self._speakers) > 1 else shown[0]}]\n")
        if why:
            self._out.write(f"[no reward: {why}]\n")
        self.turns.append(
            {
                "typed": line,
                "answers": [
                    {
                        "model": speaker.name,
                        "text": answer.text,
                        "tokens": answer.num_tokens,
                        "finished": answer.finished,
                        "stopped": answer.stopped,
                        **({"reward": reward} if self._source is not None else {}),
                    }
                    for speaker, answer, reward in zip(self._speakers, answers, rewards or [None] * len(answers), strict=False)
                ],
            }
        )

    def _note(self, answer: Answer) -> str:
        """What is said after an answer that the model did not end."""
        if answer.stopped:
            return " [stopped]"
        return "" if answer.finished else f" [cut after {answer.num_tokens} tokens]"

    def _rewards(self, answers: Sequence[Answer]) -> tuple[list[float | None], str]:
        """The answers' rewards, and why there are none: answers to the same conversation are compared with each other."""
        if self._source is None:
            return [], ""
        same = all(answer.prompt == answers[0].prompt for answer in answers)
        parts = [answers] if same else [[answer] for answer in answers]
        try:
            return [
                reward for number, part in enumerate(parts) for reward in self._source.score(_group(f"turn-{number}", part))
            ], ""
        # A source may need what a typed line does not have, such as a known result: the talk goes on without.
        except ValueError as error:
            return [], str(error)


def _group(name: str, answers: Sequence[Answer]) -> Group:
    prompt = answers[0].prompt
    candidates = [
        Candidate(
            answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}],
            finished=answer.finished,
        )
        for answer in answers
    ]
    return Group(id=name, prompt=prompt, candidates=candidates)

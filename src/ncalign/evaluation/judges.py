"""Judges: a language model on a server that compares or rates answers, and reward sources that compare them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal, TypeAlias, TypeVar

from ncalign.config import EvalJudgeConfig
from ncalign.evaluation.records import Answer, Game, Question, Rating
from ncalign.groups import Candidate, Group, Message
from ncalign.progress import Bar, say
from ncalign.rewards.base import RewardSource, score_many
from ncalign.rewards.judge import read_template
from ncalign.rewards.verdicts import ask_verdicts, fill
from ncalign.server import Choice, Server, ServerError
from ncalign.store import Store

Answers: TypeAlias = Mapping[str, Answer]
"""A model's answers by question."""

Verdict = TypeVar("Verdict")
Mode: TypeAlias = Literal["logprobs", "labels"]

_LABEL = re.compile(r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A)\s*\]\]")
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_FIRST = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
_STRONG_WEIGHT = 3
_TOP_LOGPROBS = 20
# An estimate: English text has about four characters a token.
_CHARACTERS_A_TOKEN = 4
_LOWEST, _HIGHEST = 1.0, 10.0
_LETTER_BODY = {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}


@dataclass
class Account:
    """What judging came to.

    Attributes:
        mode: how verdicts were had.
        asked: verdicts asked for.
        identical: questions whose two answers are the same, which are ties and not asked about.
        missing: those that could not be had, by reason; they count nowhere.
        remembered: requests answered from disk.
        requests: requests that the server answered now.
        prompt_tokens: as the server counted them, now.
        completion_tokens: as the server counted them, now.
        cost: of these, where prices are known.
        first_failure: what the server said where it gave no answer.
    """

    mode: str
    asked: int = 0
    identical: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    remembered: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    first_failure: str = ""

    def text(self) -> str:
        """One line."""
        missing = sum(self.missing.values())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.missing.most_common())
        parts = [
            f"{self.asked} verdicts by {self.mode}",
            f"{missing} missing" + (f" ({reasons})" if reasons else ""),
            f"{self.remembered} remembered",
            f"{self.prompt_tokens} + {self.completion_tokens} tokens",
        ]
        return ", ".join([*parts, *([f"cost {self.cost:.4g}"] if self.cost is not None else [])])


class ServerJudge:
    """A language model that judges, on any OpenAI-compatible server.

    Two answers are compared in both orders, so that a judge who prefers a place says nothing. With log-probs the preference for
    the second is ``P(M) / (P(m) + P(M))`` of the first token, as AlpacaEval 2 weighs it; with labels it is Arena-Hard's five,
    the strong ones counting three times.

    Args:
        config: where the judge is, and what it is asked.
        store: keeps its answers by what was asked; a run that was stopped pays for nothing twice.

    Raises:
        ValueError: the template can't be used, or the server's client can't be made.
    """

    def __init__(self, config: EvalJudgeConfig, store: Store | None = None) -> None:
        """See the class."""
        self._config = config
        self.server = Server(config, store)
        self._templates = {name: _template(name, config) for name in _needed(config.mode)}

    def compare(self, questions: Sequence[Question], ours: Answers, theirs: Answers) -> tuple[list[Game], Account]:
        """Two games for each question that both models answered.

        Raises:
            ServerError: the judge answers nothing at all; what it answered before is kept.
            ValueError: no question was answered by both.
        """
        both = [question for question in questions if question.id in ours and question.id in theirs]
        if not both:
            raise ValueError("no question was answered by both models: nothing to compare")
        same = {question.id for question in both if ours[question.id].turns == theirs[question.id].turns}
        different = [question for question in both if question.id not in same]
        account = Account("labels" if self._config.mode == "labels" else "logprobs", identical=len(same))
        verdicts = iter(self._compared(different, ours, theirs, account) if different else [])
        games = []
        for question in both:
            for first in (True, False):
                preference, label = (0.5, "") if question.id in same else next(verdicts)
                mine = preference if first or preference is None else 1 - preference
                weight = _STRONG_WEIGHT if ">>" in label else 1
                model, baseline = ours[question.id].model, theirs[question.id].model
                games.append(Game(question.id, model, baseline, first, mine, weight, label))
        return games, account

    def _compared(
        self, questions: Sequence[Question], ours: Answers, theirs: Answers, account: Account
    ) -> list[tuple[float | None, str]]:
        """For each question in either order, the preference for what is shown first, and the label."""
        account.mode = mode = self._decided(questions[0], ours[questions[0].id], theirs[questions[0].id])
        orders = ((ours, theirs), (theirs, ours))
        prompts = [self._pair_prompt(mode, question, *order) for question in questions for order in orders]
        if mode == "logprobs":
            return [(found, "") for found in self._ask(prompts, _read_letter, _LETTER_BODY, account)]
        labels = self._ask(prompts, _read_label, {"max_tokens": self._config.max_tokens}, account)
        return [(None, "") if label is None else (_FIRST[label], label) for label in labels]

    def rate(self, questions: Sequence[Question], answers: Answers) -> tuple[list[Rating], Account]:
        """A rating for each turn of each answer, with the question's reference where it has one."""
        turns = [
            (question, turn)
            for question in questions
            if question.id in answers
            for turn in range(min(len(question.turns), len(answers[question.id].turns)))
        ]
        prompts = [self._rating_prompt(question, answers[question.id], turn) for question, turn in turns]
        account = Account("rating")
        scores = self._ask(prompts, _read_rating, {"max_tokens": self._config.max_tokens}, account)
        ratings = [
            Rating(question.id, answers[question.id].model, turn + 1, question.category, score)
            for (question, turn), score in zip(turns, scores, strict=True)
        ]
        return ratings, account

    def estimate(self, questions: Sequence[Question], answers: Sequence[Answers]) -> str:
        """What judging these would take, in words: tokens by their characters, and the cost where prices are known."""
        prompts = []
        if self._config.mode == "rating":
            prompts += [
                self._rating_prompt(question, given[question.id], turn)
                for given in answers
                for question in questions
                if question.id in given
                for turn in range(min(len(question.turns), len(given[question.id].turns)))
            ]
            most = self._config.max_tokens
        else:
            mode: Mode = "logprobs" if self._config.mode == "logprobs" else "labels"
            most = 1 if mode == "logprobs" else self._config.max_tokens
            for theirs in answers[1:]:
                both = [question for question in questions if question.id in answers[0] and question.id in theirs]
                prompts += [self._pair_prompt(mode, question, answers[0], theirs) for question in both for _ in range(2)]
        tokens = sum(map(len, prompts)) // _CHARACTERS_A_TOKEN
        cost = self._cost(tokens, most * len(prompts))
        money = "" if cost is None else f", at most {cost:.4g} at your prices"
        return f"{len(prompts)} verdicts, about {tokens} prompt tokens and at most {most * len(prompts)} of verdicts{money}"

    def _ask(
        self,
        prompts: Sequence[str],
        read: Callable[[Choice], Verdict | None],
        body: Mapping[str, Any],
        account: Account,
    ) -> list[Verdict | None]:
        before = replace(self.server.usage)
        with Bar("Judging", len(prompts)) as bar:
            found = ask_verdicts(
                self.server, prompts, read, attempts=self._config.attempts, body=body, done=lambda index: bar.advance()
            )
        usage = self.server.usage
        account.asked += len(prompts)
        account.missing += found.missing
        account.first_failure = found.first_failure
        account.remembered += usage.remembered - before.remembered
        account.requests += usage.requests - before.requests
        account.prompt_tokens += usage.prompt_tokens - before.prompt_tokens
        account.completion_tokens += usage.completion_tokens - before.completion_tokens
        account.cost = self._cost(account.prompt_tokens, account.completion_tokens)
        return found.values

    def _cost(self, tokens_in: int, tokens_out: int) -> float | None:
        if self._config.price_in is None and self._config.price_out is None:
            return None
        return ((self._config.price_in or 0.0) * tokens_in + (self._config.price_out or 0.0) * tokens_out) / 1e6

    def _decided(self, question: Question, ours: Answer, theirs: Answer) -> Mode:
        """How verdicts are had: as configured, or by log-probs where the judge gives them for the first question."""
        if self._config.mode != "auto":
            return "labels" if self._config.mode == "labels" else "logprobs"
        prompt = self._pair_prompt("logprobs", question, {question.id: ours}, {question.id: theirs})
        try:
            found = ask_verdicts(self.server, [prompt], _read_letter, attempts=1, body=_LETTER_BODY)
        except ServerError:
            # It may refuse log-probs alone: the labels' own requests tell whether it is down.
            say("The judge gives no log-probs: verdicts by five labels")
            return "labels"
        mode: Mode = "labels" if found.values[0] is None else "logprobs"
        by = "log-probs of one letter" if mode == "logprobs" else "five labels, since the judge gives no log-probs"
        say(f"Verdicts by {by}")
        return mode

    def _pair_prompt(self, mode: Mode, question: Question, first: Answers, second: Answers) -> str:
        reference = "" if not question.references else f"\n<reference>\n{_joined(question.references)}\n</reference>\n"
        return fill(
            self._templates[mode],
            {
                "question": _joined(question.turns),
                "reference": reference,
                "answer_a": _joined(first[question.id].turns),
                "answer_b": _joined(second[question.id].turns),
            },
        )

    def _rating_prompt(self, question: Question, answer: Answer, turn: int) -> str:
        reference = question.references[turn] if turn < len(question.references) else ""
        conversation = []
        for place in range(turn + 1):
            conversation.append(f"User: {question.turns[place]}")
            if place < turn:
                conversation.append(f"Assistant: {answer.turns[place]}")
        texts = {"conversation": "\n\n".join(conversation), "answer": answer.turns[turn], "reference": reference}
        return fill(self._templates["reference" if reference else "rating"], texts)


class RewardJudge:
    """A reward source that judges: of two answers the one with the higher reward is better; equal rewards are a tie.

    Args:
        source: a reward model, a verifier, or a function.
    """

    def __init__(self, source: RewardSource) -> None:
        """See the class."""
        self._source = source

    def rewards(self, questions: Sequence[Question], answers: Answers) -> dict[str, float | None]:
        """The reward of each answer's last turn, after the conversation up to it; None where the source has none."""
        answered = [question for question in questions if question.id in answers]
        groups = [_as_group(question, answers[question.id]) for question in answered]
        found = score_many(self._source, groups) if groups else []
        return {question.id: rewards[0] for question, rewards in zip(answered, found, strict=True)}

    def compare(self, questions: Sequence[Question], ours: Answers, theirs: Answers) -> tuple[list[Game], Account]:
        """Two games for each question that both models answered; a reward does not depend on the order.

        Raises:
            ValueError: no question was answered by both, or the source fails.
        """
        both = [question for question in questions if question.id in ours and question.id in theirs]
        if not both:
            raise ValueError("no question was answered by both models: nothing to compare")
        mine, other = self.rewards(both, ours), self.rewards(both, theirs)
        account, games = Account("rewards", asked=len(both)), []
        for question in both:
            a, b = mine[question.id], other[question.id]
            preference = None if a is None or b is None else 0.5 if a == b else float(a > b)
            account.missing.update(["no reward"] if preference is None else [])
            model, baseline = ours[question.id].model, theirs[question.id].model
            games += [Game(question.id, model, baseline, first, preference) for first in (True, False)]
        return games, account


def _as_group(question: Question, answer: Answer) -> Group:
    prompt: list[Message] = []
    last = min(len(question.turns), len(answer.turns)) - 1
    for place in range(last + 1):
        prompt.append({"role": "user", "content": question.turns[place]})
        if place < last:
            prompt.append({"role": "assistant", "content": answer.turns[place]})
    candidate = Candidate([{"role": "assistant", "content": answer.turns[last]}], source=answer.model)
    return Group(question.id, prompt, [candidate], dict(question.metadata))


def _joined(turns: Sequence[str]) -> str:
    """A text with several turns numbered."""
    if len(turns) == 1:
        return turns[0]
    return "\n\n".join(f"(turn {number}) {text}" for number, text in enumerate(turns, start=1))


def _read_letter(choice: Choice) -> float | None:
    """The preference for the first answer, from the log-probs of the two letters; None where neither is likely."""
    if not choice.top:
        return None
    odds = {"m": 0.0, "M": 0.0}
    for token, logprob in choice.top[0].items():
        if token.strip() in odds:
            odds[token.strip()] += math.exp(logprob)
    total = odds["m"] + odds["M"]
    return odds["m"] / total if total > 0 else None


def _read_label(choice: Choice) -> str | None:
    """The label; several different ones are none: the judge has not said which it means."""
    found = set(_LABEL.findall(choice.text))
    return str(found.pop()) if len(found) == 1 else None


def _read_rating(choice: Choice) -> float | None:
    found = set(_RATING.findall(choice.text))
    if len(found) != 1:
        return None
    rating = float(found.pop())
    return rating if _LOWEST <= rating <= _HIGHEST else None


_FILES = {
    "logprobs": ("pairwise_letter.txt", ("question", "answer_a", "answer_b")),
    "labels": ("pairwise_labels.txt", ("question", "answer_a", "answer_b")),
    "rating": ("rating.txt", ("conversation", "answer")),
    "reference": ("rating_reference.txt", ("conversation", "answer")),
}


def _needed(mode: str) -> tuple[str, ...]:
    return {"auto": ("logprobs", "labels"), "rating": ("rating", "reference")}.get(mode, (mode,))


def _template(name: str, config: EvalJudgeConfig) -> str:
    file, needed = _FILES[name]
    if config.template is None:
        return (resources.files("ncalign.evaluation") / "prompts" / file).read_text(encoding="utf-8")
    if config.mode == "auto":
        raise ValueError(f"judge.template {config.template} needs a judge.mode: logprobs, labels or rating")
    text = read_template(config.template)
    lacking = ", ".join(f"{{{place}}}" for place in needed if f"{{{place}}}" not in text)
    if lacking:
        raise ValueError(f"judge.template {config.template} lacks {lacking}: the judge sees nothing without")
    return text

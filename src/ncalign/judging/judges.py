"""Judges: a language model on a server that compares or rates answers, and reward sources that compare them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal, TypeAlias, TypeVar

from ncalign.core.progress import Bar, say
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group, Message
from ncalign.generation.client import Choice, Server, ServerError
from ncalign.judging.config import EvalJudgeConfig
from ncalign.judging.records import LABELS, Answer, Question, verdict_weight
from ncalign.rewards.base import RewardSource, score_many
from ncalign.rewards.judge import read_template
from ncalign.rewards.verdicts import Verdicts, ask_verdicts, concluded, fill
from ncalign.stats.records import Game, Rating

Answers: TypeAlias = Mapping[str, Answer]
"""A model's answers by question."""

Verdict = TypeVar("Verdict")
Mode: TypeAlias = Literal["logprobs", "labels"]

_LABEL = re.compile(r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A)\s*\]\]")
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_TOP_LOGPROBS = 20
# The first questions may be too long for the judge, or be answered with neither letter.
_NUM_PROBES = 8
# An estimate: English text has about four characters a token.
_CHARACTERS_A_TOKEN = 4
_LOWEST, _HIGHEST = 1.0, 10.0
_BY_REFERENCE = frozenset({"math", "reasoning", "coding"})
_WITHOUT_REFERENCE = frozenset({"writing", "roleplay", "extraction", "stem", "humanities"})
"""MT-Bench's categories."""
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
            *([f"{self.identical} questions with equal answers, not asked about"] if self.identical else []),
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
        self._config = config
        self.server = Server(config, store)
        self._templates = {name: _template(name, config) for name in _needed(config.mode)}
        self._mode: Mode | None = None if config.mode == "auto" else "logprobs" if config.mode == "logprobs" else "labels"

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
        account = Account(self._mode or "auto", identical=len(same))
        verdicts = iter(self._compared(different, ours, theirs, account) if different else [])
        games = []
        for question in both:
            for first in (True, False):
                preference, label = (0.5, "") if question.id in same else next(verdicts)
                mine = preference if first or preference is None else 1 - preference
                weight = verdict_weight(label)
                model, baseline = ours[question.id].model, theirs[question.id].model
                games.append(Game(question.id, model, baseline, first, mine, weight, label))
        return games, account

    def _compared(
        self, questions: Sequence[Question], ours: Answers, theirs: Answers, account: Account
    ) -> list[tuple[float | None, str]]:
        """For each question in either order, the preference for what is shown first, and the label."""
        letters: list[float | None] = []
        if self._mode is None:
            letters = self._probe(self._pair_prompts("logprobs", questions, ours, theirs)[:_NUM_PROBES], account)
        assert self._mode is not None
        account.mode = self._mode
        prompts = self._pair_prompts(self._mode, questions, ours, theirs)
        if self._mode == "logprobs":
            # Asked again, the judge would give the same log-probs.
            letters += self._ask(prompts[len(letters) :], _read_letter, _LETTER_BODY, account, attempts=1)
            return [(found, "") for found in letters]
        labels = self._ask(prompts, _read_label, {"max_tokens": self._config.max_tokens}, account)
        return [(None, "") if label is None else (LABELS[label], label) for label in labels]

    def _probe(self, prompts: Sequence[str], account: Account) -> list[float | None]:
        """Decide how verdicts are had, once, so that all models are judged in one way.

        Returns:
            The verdicts on these prompts where it is by log-probs, else none.

        Raises:
            ServerError: the judge answers nothing, and not because it refuses log-probs.
        """
        try:
            found = self._asked(prompts, _read_letter, attempts=1, body=_LETTER_BODY, account=account)
            why = "the judge gives no log-probs of the letters"
        except ServerError as error:
            if not error.refused:
                raise
            found, why = Verdicts([]), f"the judge refuses to give log-probs ({error})"
        if all(value is None for value in found.values):
            self._mode = "labels"
            say(f"Verdicts by five labels, since {why}")
            return []
        self._mode = "logprobs"
        say("Verdicts by log-probs of one letter")
        self._count(found, account)
        return found.values

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
        """What judging these would take, in words: tokens by their characters, and the cost where prices are known.

        It counts each verdict once, as if nothing were remembered and every verdict could be read.
        """
        prompts = []
        if self._config.mode == "rating":
            prompts += [
                self._rating_prompt(question, given[question.id], turn)
                for given in answers
                for question in questions
                if question.id in given
                for turn in range(min(len(question.turns), len(given[question.id].turns)))
            ]
        else:
            mode: Mode = self._mode or "labels"
            for theirs in answers[1:]:
                ours = answers[0]
                both = [question for question in questions if question.id in ours and question.id in theirs]
                different = [question for question in both if ours[question.id].turns != theirs[question.id].turns]
                prompts += self._pair_prompts(mode, different, ours, theirs)
        most = 1 if self._config.mode != "rating" and self._mode == "logprobs" else self._config.max_tokens
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
        *,
        attempts: int | None = None,
    ) -> list[Verdict | None]:
        """The verdicts, which are counted, with those that are missing."""
        if not prompts:
            return []
        with Bar("Judging", len(prompts)) as bar:
            found = self._asked(
                prompts,
                read,
                attempts=attempts or self._config.attempts,
                body=body,
                account=account,
                done=lambda index: bar.advance(),
            )
        self._count(found, account)
        return found.values

    def _count(self, found: Verdicts[Any], account: Account) -> None:
        account.asked += len(found.values)
        account.missing += found.missing
        account.first_failure = account.first_failure or found.first_failure

    def _asked(
        self,
        prompts: Sequence[str],
        read: Callable[[Choice], Verdict | None],
        *,
        attempts: int,
        body: Mapping[str, Any],
        account: Account,
        done: Callable[[int], None] = lambda index: None,
    ) -> Verdicts[Verdict]:
        """The verdicts; what they took is added to the account."""
        usage = self.server.usage
        before = replace(usage)
        found = ask_verdicts(self.server, prompts, read, attempts=attempts, body=body, done=done)
        account.remembered += usage.remembered - before.remembered
        account.requests += usage.requests - before.requests
        account.prompt_tokens += usage.prompt_tokens - before.prompt_tokens
        account.completion_tokens += usage.completion_tokens - before.completion_tokens
        account.cost = self._cost(account.prompt_tokens, account.completion_tokens)
        return found

    def _cost(self, tokens_in: int, tokens_out: int) -> float | None:
        if self._config.price_in is None and self._config.price_out is None:
            return None
        return ((self._config.price_in or 0.0) * tokens_in + (self._config.price_out or 0.0) * tokens_out) / 1e6

    def _pair_prompts(self, mode: Mode, questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[str]:
        """Each question twice: our answer first, and theirs first."""
        orders = ((ours, theirs), (theirs, ours))
        return [self._pair_prompt(mode, question, *order) for question in questions for order in orders]

    def _pair_prompt(self, mode: Mode, question: Question, first: Answers, second: Answers) -> str:
        known = _references(question)
        texts = {
            "question": _joined(question.turns),
            "reference": f"\n<reference>\n{_joined(known)}\n</reference>\n" if known else "",
            "answer_a": _joined(first[question.id].turns),
            "answer_b": _joined(second[question.id].turns),
        }
        return fill(self._templates[mode], texts)

    def _rating_prompt(self, question: Question, answer: Answer, turn: int) -> str:
        known = _references(question)
        # A later turn builds on the first, and so does its reference.
        reference = _joined(known[: turn + 1]) if turn < len(known) else ""
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
        self._source = source
        self._known: dict[Answer, float | None] = {}

    def rewards(self, questions: Sequence[Question], answers: Answers) -> dict[str, float | None]:
        """The reward of each answer's last turn, after the conversation up to it; None where the source has none."""
        answered = [question for question in questions if question.id in answers]
        # A baseline meets every model, and its answers are scored once.
        new = [question for question in answered if answers[question.id] not in self._known]
        found = score_many(self._source, [_as_group(question, answers[question.id]) for question in new]) if new else []
        self._known |= {answers[question.id]: rewards[0] for question, rewards in zip(new, found, strict=True)}
        return {question.id: self._known[answers[question.id]] for question in answered}

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


def _references(question: Question) -> Sequence[str]:
    """The right answers that a judge is shown: MT-Bench shows them in some categories alone, whatever its file holds."""
    known = question.references if any(text.strip() for text in question.references) else ()
    return () if question.category in _WITHOUT_REFERENCE else known


def num_without_reference(questions: Sequence[Question]) -> int:
    """Questions of categories that are judged by a reference, which have none."""
    return sum(question.category in _BY_REFERENCE and not _references(question) for question in questions)


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
    found = set(_LABEL.findall(concluded(choice.text)))
    return str(found.pop()) if len(found) == 1 else None


def _read_rating(choice: Choice) -> float | None:
    found = set(_RATING.findall(concluded(choice.text)))
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
        return (resources.files("ncalign.judging") / "prompts" / file).read_text(encoding="utf-8")
    if config.mode == "auto":
        raise ValueError(f"judge.template {config.template} needs a judge.mode: logprobs, labels or rating")
    text = read_template(config.template)
    lacking = ", ".join(f"{{{place}}}" for place in needed if f"{{{place}}}" not in text)
    if lacking:
        raise ValueError(f"judge.template {config.template} lacks {lacking}: the judge sees nothing without")
    return text

"""Judges: a language model on a server that compares or rates answers, and reward sources that compare them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from ncalign.core.progress import Bar, say
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group
from ncalign.generation.client import Server
from ncalign.generation.failures import ServerError
from ncalign.generation.wire import Choice
from ncalign.judging.config import EvalJudgeConfig
from ncalign.judging.judge_prompts import judge_templates, pair_prompts, rating_prompts
from ncalign.judging.records import LABELS, Answer, Answers, Question, verdict_weight
from ncalign.rewards.base import RewardSource, score_many
from ncalign.rewards.reading import read_label, read_rating
from ncalign.rewards.verdicts import Account, ask_verdicts
from ncalign.stats.records import Game, Rating

Verdict = TypeVar("Verdict")

_LOWEST, _HIGHEST = 1.0, 10.0
# The first questions may be too long for the judge, or be answered with neither letter.
_NUM_PROBES = 8
# An estimate: English text has about four characters a token.
_CHARACTERS_A_TOKEN = 4
_LETTER_BODY = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}


class ServerJudge:
    """A language model that judges, on any OpenAI-compatible server.

    Two answers are compared in both orders, so that a judge who always prefers the first has no effect. With log-probs the
    preference for the second is ``P(M) / (P(m) + P(M))`` of the first token, as AlpacaEval 2 weighs it; with labels it is
    Arena-Hard's five, the strong ones counting three times.

    Args:
        config: where the judge is, and what it is asked.
        store: keeps its answers by what was asked, so that a run that was stopped asks for nothing twice.

    Raises:
        ValueError: the template can't be used, or the server's client can't be made.
    """

    def __init__(self, config: EvalJudgeConfig, store: Store | None = None) -> None:
        self._config = config
        self._server = Server(config.server, store)
        self._templates = judge_templates(config.mode, config.template)
        self._mode: Literal["logprobs", "labels"] | None = (
            None if config.mode == "auto" else "logprobs" if config.mode == "logprobs" else "labels"
        )

    def compare(self, questions: Sequence[Question], ours: Answers, theirs: Answers) -> tuple[list[Game], Account]:
        """Two games for each question that both models answered.

        Raises:
            ServerError: the judge answers nothing at all; what it answered before is kept.
            ValueError: no question was answered by both.
        """
        both = _answered_by_both(questions, ours, theirs)
        different = _that_differ(both, ours, theirs)
        account = Account(self._mode or "auto", identical=len(both) - len(different))
        verdicts = iter(self._verdicts(different, ours, theirs, account) if different else [])
        games = []
        for question in both:
            mine, other = ours[question.id], theirs[question.id]
            for first in (True, False):
                preference, label = (0.5, "") if mine.turns == other.turns else next(verdicts)
                preference = preference if first or preference is None else 1 - preference
                games.append(Game(question.id, mine.model, other.model, first, preference, verdict_weight(label), label))
        return games, account

    def _verdicts(
        self, questions: Sequence[Question], ours: Answers, theirs: Answers, account: Account
    ) -> list[tuple[float | None, str]]:
        """For each question in either order, the preference for what is shown first, and the label."""
        letters: list[float | None] = []
        if self._mode is None:
            letters = self._probe(pair_prompts(self._templates["logprobs"], questions, ours, theirs)[:_NUM_PROBES], account)
        assert self._mode is not None
        account.mode = self._mode
        prompts = pair_prompts(self._templates[self._mode], questions, ours, theirs)
        if self._mode == "logprobs":
            # Asked again, the judge would give the same log-probs.
            letters += self._ask(prompts[len(letters) :], _read_letter, _LETTER_BODY, account, attempts=1)
            return [(found, "") for found in letters]
        labels = self._ask(prompts, _read_label, {"max_tokens": self._config.max_tokens}, account)
        return [(None, "") if label is None else (LABELS[label], label) for label in labels]

    def _probe(self, prompts: Sequence[str], account: Account) -> list[float | None]:
        """Decide once between log-probs and labels, so that all models are judged in the same way.

        Returns:
            The verdicts on these prompts where it is by log-probs, else none.

        Raises:
            ServerError: the judge answers nothing, and not because it refuses log-probs.
        """
        try:
            found = ask_verdicts(self._server, prompts, _read_letter, attempts=1, body=_LETTER_BODY, account=account)
            why = "the judge gives no log-probs of the letters"
        except ServerError as error:
            if not error.refused:
                raise
            found, why = [], f"the judge refuses to give log-probs ({error})"
        if all(value is None for value in found):
            self._mode = "labels"
            say(f"Verdicts by five labels, since {why}")
            # The same questions are asked for labels now: they are counted then.
            account.asked, account.missing, account.first_failure = 0, Counter(), ""
            return []
        self._mode = "logprobs"
        say("Verdicts by log-probs of one letter")
        return found

    def rate(self, questions: Sequence[Question], answers: Answers) -> tuple[list[Rating], Account]:
        """A rating for each turn of each answer, with the question's reference where it has one."""
        turns = rating_prompts(self._templates, questions, answers)
        account = Account("rating")
        scores = self._ask([prompt for *_, prompt in turns], _read_rating, {"max_tokens": self._config.max_tokens}, account)
        ratings = [
            Rating(question.id, answers[question.id].model, turn + 1, question.category, score)
            for (question, turn, _), score in zip(turns, scores, strict=True)
        ]
        return ratings, account

    def estimate(self, questions: Sequence[Question], answers: Sequence[Answers]) -> str:
        """What judging these would take, in words: tokens by their characters, and the cost where prices are known.

        It counts each verdict once, as if no answer were on disk and every verdict could be read.
        """
        if self._config.mode == "rating":
            prompts = [prompt for given in answers for *_, prompt in rating_prompts(self._templates, questions, given)]
        else:
            ours, *others = answers
            template = self._templates[self._mode or "labels"]
            asked = [pair_prompts(template, _that_differ(questions, ours, theirs), ours, theirs) for theirs in others]
            prompts = [prompt for pairs in asked for prompt in pairs]
        most = len(prompts) * (1 if self._mode == "logprobs" else self._config.max_tokens)
        tokens = sum(map(len, prompts)) // _CHARACTERS_A_TOKEN
        cost = self._cost(tokens, most)
        money = "" if cost is None else f", at most {cost:.4g} at your prices"
        return f"{len(prompts)} verdicts, about {tokens} prompt tokens and at most {most} of verdicts{money}"

    def _ask(
        self,
        prompts: Sequence[str],
        read: Callable[[Choice], Verdict | None],
        body: Mapping[str, Any],
        account: Account,
        *,
        attempts: int | None = None,
    ) -> list[Verdict | None]:
        found: list[Verdict | None] = []
        if prompts:
            ask = partial(ask_verdicts, attempts=attempts or self._config.attempts, body=body, account=account)
            with Bar("Judging", len(prompts)) as bar:
                found = ask(self._server, prompts, read, done=lambda index: bar.advance())
        account.cost = self._cost(account.prompt_tokens, account.completion_tokens)
        return found

    def _cost(self, tokens_in: int, tokens_out: int) -> float | None:
        if self._config.price_in is None and self._config.price_out is None:
            return None
        return ((self._config.price_in or 0.0) * tokens_in + (self._config.price_out or 0.0) * tokens_out) / 1e6


class RewardJudge:
    """A reward source that judges: of two answers the one with the higher reward is better; equal rewards are a tie.

    Args:
        source: a reward model, a verifier, or a function.
    """

    def __init__(self, source: RewardSource) -> None:
        self._source = source
        # By question and answer: models that answer in the same words have the same reward.
        self._known: dict[tuple[str, tuple[str, ...]], float | None] = {}

    def rewards(self, questions: Sequence[Question], answers: Answers) -> dict[str, float | None]:
        """The reward of each answer's last turn, after the conversation up to it; None where the source has none."""
        said = {question.id: (question.id, answers[question.id].turns) for question in questions if question.id in answers}
        # A baseline meets every model, and its answers are scored once.
        new = [question for question in questions if question.id in said and said[question.id] not in self._known]
        found = score_many(self._source, [_as_group(question, answers[question.id]) for question in new]) if new else []
        self._known |= {said[question.id]: rewards[0] for question, rewards in zip(new, found, strict=True)}
        return {question: self._known[own] for question, own in said.items()}

    def compare(self, questions: Sequence[Question], ours: Answers, theirs: Answers) -> tuple[list[Game], Account]:
        """Two games for each question that both models answered; a reward does not depend on the order.

        Raises:
            ValueError: no question was answered by both, or the source fails.
        """
        both = _answered_by_both(questions, ours, theirs)
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
    last = min(len(question.turns), len(answer.turns)) - 1
    candidate = Candidate([{"role": "assistant", "content": answer.turns[last]}], source=answer.model)
    return Group(question.id, question.conversation(answer.turns[:last]), [candidate], dict(question.metadata))


def _answered_by_both(questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[Question]:
    both = [question for question in questions if question.id in ours and question.id in theirs]
    if not both:
        raise ValueError("no question was answered by both models: nothing to compare")
    return both


def _that_differ(questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[Question]:
    """Questions that both models answered, not with the same words: equal answers are a tie that nobody is asked about."""
    return [q for q in questions if q.id in ours and q.id in theirs and ours[q.id].turns != theirs[q.id].turns]


def _read_label(choice: Choice) -> str | None:
    return read_label(choice.text)


def _read_rating(choice: Choice) -> float | None:
    return read_rating(choice.text, lowest=_LOWEST, highest=_HIGHEST)


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

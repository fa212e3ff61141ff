"""Rewards from a language model on an OpenAI-compatible server: ratings, or comparisons in both orders.

A verdict that can't be read is asked for again, and then missing: it is neither zero nor a tie.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from ncalign.core.store import Store
from ncalign.data.groups import Group
from ncalign.data.rendering import message_text, transcript
from ncalign.generation.client import Server
from ncalign.generation.wire import Choice
from ncalign.model.chat import as_messages
from ncalign.rewards.base import completion_texts
from ncalign.rewards.config import JudgeConfig
from ncalign.rewards.reading import read_label, read_rating
from ncalign.rewards.verdicts import Account, ask_verdicts, fill, load_template, mark_of, shown_tools

_MOST_PAIRED = 2000
"""Completions of a group all of whose pairs are listed."""
_WORTH = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}


class JudgeReward:
    """Scores completions by a judge's verdicts.

    Pointwise, a reward is the rating. Pairwise, it is the share of comparisons won within the group, a tie counting half; each
    pair is judged in both orders and counts the mean of the two, so that a judge who always prefers the first answer has no
    effect. Equal completions have one reward: they are compared with the others once for all of them, and where there are no
    others they are tied, which nobody is asked about.

    Args:
        config: where the judge is, and what it is asked.
        store: keeps verdicts by what was asked.

    Attributes:
        template: the judge's prompt.
        account: what judging took, and how many verdicts are missing.
        num_changed: pairs whose two orders contradict each other.

    Raises:
        ValueError: the template can't be used, or the server's client can't be made.
    """

    def __init__(self, config: JudgeConfig, store: Store | None = None) -> None:
        self._config = config
        needed = ("prompt", "completion") if config.mode == "pointwise" else ("prompt", "completion_a", "completion_b")
        self.template = load_template("ncalign.rewards", f"{config.mode}.txt", needed, config.template)
        self._server = Server(config.server, store)
        self.account = Account(config.mode)
        self.num_changed = 0

    def score(self, group: Group) -> list[float | None]:
        """Score a group; see :class:`ncalign.rewards.base.RewardSource`."""
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Score several groups with all their verdicts asked for at once."""
        if self._config.mode == "pairwise":
            return self._win_shares(groups)
        asked = [{"prompt": prompt_text(group), "completion": text} for group in groups for text in completion_texts(group)]
        ratings = iter(self._verdicts(asked, self._rating))
        return [[next(ratings) for _ in group.candidates] for group in groups]

    def _win_shares(self, groups: Sequence[Group]) -> list[list[float | None]]:
        every = [completion_texts(group) for group in groups]
        texts = [list(dict.fromkeys(row)) for row in every]
        pairs = [(g, a, b) for g, group in enumerate(groups) for a, b in self._pairs(group.id, len(texts[g]))]
        asked = [
            {"prompt": prompt_text(groups[g]), "completion_a": texts[g][first], "completion_b": texts[g][second]}
            for g, a, b in pairs
            for first, second in ((a, b), (b, a))
        ]
        verdicts = self._verdicts(asked, _read_choice)
        won: list[list[list[float]]] = [[[] for _ in row] for row in texts]
        for (g, a, b), forward, backward in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            if forward is None or backward is None:
                continue
            self.num_changed += {forward, backward} in ({0.0}, {1.0})
            share = (forward + 1 - backward) / 2
            won[g][a].append(share)
            won[g][b].append(1 - share)
        found: list[list[float | None]] = []
        for row, distinct, shares in zip(every, texts, won, strict=True):
            tied = 0.5 if len(distinct) == 1 < len(row) else None
            share_of = {text: sum(own) / len(own) if own else tied for text, own in zip(distinct, shares, strict=True)}
            found.append([share_of[text] for text in row])
        return found

    def _pairs(self, group_id: str, number: int) -> list[tuple[int, int]]:
        """Pairs of a group's completions to compare: all, or so many that each completion has about ``opponents`` others."""
        wanted = self._config.opponents
        if number > _MOST_PAIRED:
            return self._in_a_ring(group_id, number, wanted)
        every = list(itertools.combinations(range(number), 2))
        if wanted is None or wanted >= number - 1:
            return every
        random.Random(group_id).shuffle(every)
        met = [0] * number
        chosen = []
        for a, b in every:
            if met[a] < wanted and met[b] < wanted:
                chosen.append((a, b))
                met[a], met[b] = met[a] + 1, met[b] + 1
        return sorted(chosen)

    def _in_a_ring(self, group_id: str, number: int, wanted: int | None) -> list[tuple[int, int]]:
        """Each of very many completions with its next ones in a random order, so that no list of all pairs is made."""
        if wanted is None or wanted >= number - 1:
            raise ValueError(
                f"group {group_id!r} has {number} completions, each to be compared with each: set judge.opponents, the "
                "number of others that each is compared with"
            )
        order = list(range(number))
        random.Random(group_id).shuffle(order)
        ahead = (wanted + 1) // 2
        pairs = ((order[place], order[(place + step) % number]) for place in range(number) for step in range(1, ahead + 1))
        return sorted({(min(pair), max(pair)) for pair in pairs})

    def _rating(self, choice: Choice) -> float | None:
        return read_rating(choice.text, lowest=self._config.lowest, highest=self._config.highest)

    def _verdicts(self, asked: Sequence[dict[str, str]], read: Callable[[Choice], float | None]) -> list[float | None]:
        scale = {"lowest": f"{self._config.lowest:g}", "highest": f"{self._config.highest:g}"}
        prompts = [fill(self.template, {**scale, "mark": mark_of(texts), **texts}) for texts in asked]
        body = {"max_tokens": self._config.max_tokens}
        return ask_verdicts(self._server, prompts, read, attempts=self._config.attempts, body=body, account=self.account)


def prompt_text(group: Group) -> str:
    """A prompt as a judge reads it: a single question as it is, a conversation with its roles; its tools before."""
    messages = as_messages(group.prompt)
    return shown_tools(group.tools) + (message_text(messages[0]) if len(messages) == 1 else transcript(messages))


def _read_choice(choice: Choice) -> float | None:
    label = read_label(choice.text)
    return None if label is None else _WORTH[label]

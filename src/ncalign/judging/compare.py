"""Answers judged: compared with a baseline's or rated by themselves, counted, and their verdicts written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ncalign.core.atomic import write_jsonl_atomic
from ncalign.core.outputs import renew
from ncalign.core.progress import say
from ncalign.judging.counts import (
    VERDICTS,
    Counting,
    Results,
    add_accounts,
    add_comparisons,
    add_missing,
    count_games,
    count_ratings,
)
from ncalign.judging.interop import (
    write_alpaca_annotations,
    write_arena_judgements,
    write_fastchat_pairs,
    write_fastchat_ratings,
)
from ncalign.judging.judge_prompts import num_without_reference
from ncalign.judging.judges import RewardJudge, ServerJudge
from ncalign.judging.readings import pairs_to_read, ratings_to_read
from ncalign.judging.records import Answers, Question
from ncalign.stats.missing import compare_missing
from ncalign.stats.preferences import question_preferences
from ncalign.stats.records import Game, Rating


def compare_answers(
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    judge: ServerJudge | RewardJudge,
    results: Results,
    counting: Counting,
    *,
    folder: Path,
    called: str,
) -> None:
    """Compare the first model and those from the third on with the second, the baseline, and add to the results.

    Args:
        questions: of the set.
        answers: by model.
        judge: compares two answers.
        results: added to.
        counting: how verdicts are counted.
        folder: for the verdicts, in our form and those of other tools.
        called: the judge's name in these files; empty for the way it judges.

    Raises:
        ValueError: two models have no question in common, or there is no verdict.
        ServerError: the judge answers nothing at all; what it answered is kept.
    """
    first, baseline, *others = answers
    pairs = [(first, baseline), *((name, baseline) for name in others)]
    games: list[Game] = []
    accounts = []
    if isinstance(judge, ServerJudge):
        for name, other in pairs:
            say(f"{name} against {other}: {judge.estimate(questions, [answers[name], answers[other]])}")
    for name, other in pairs:
        found, account = judge.compare(questions, answers[name], answers[other])
        games += found
        accounts.append(account)
        say(f"{name} against {other}: {account.text()}")
    renew(folder, VERDICTS, verb="evaluate", folders=["annotations", "arena_hard", "fastchat"])
    write_jsonl_atomic(map(asdict, games), folder / "games.jsonl")
    add_accounts(accounts, results)
    if isinstance(judge, RewardJudge):
        _add_mean_rewards(judge, questions, answers, results, counting)
    count_games(games, results, counting, answers=answers, ordered=isinstance(judge, ServerJudge))
    results.readings = pairs_to_read(
        questions, answers, games, other_judge=counting.other_judge, ordered=isinstance(judge, ServerJudge)
    )
    called = called or accounts[0].mode
    categories = {question.id: question.category for question in questions}
    for name, other in pairs:
        # A file for each model, as AlpacaEval, Arena-Hard and FastChat read it.
        own = [game for game in games if (game.model, game.baseline) == (name, other)]
        file, outcomes = file_name(name), question_preferences(own).by_question
        annotations = folder / "annotations" / f"{file}.json"
        write_alpaca_annotations(annotations, questions, answers[name], answers[other], outcomes, annotator=called)
        write_arena_judgements(own, folder / "arena_hard" / f"{file}.jsonl", judge=called, categories=categories)
        write_fastchat_pairs(own, folder / "fastchat" / f"{file}_pair.jsonl", judge=called)


def file_name(model: str) -> str:
    """A model's name as the name of a file."""
    return model.replace("/", "--")


def _add_mean_rewards(
    judge: RewardJudge, questions: Sequence[Question], answers: Mapping[str, Answers], results: Results, counting: Counting
) -> None:
    known = {
        name: {question: reward for question, reward in judge.rewards(questions, given).items() if reward is not None}
        for name, given in answers.items()
    }
    results.values["mean_reward"] = {name: float(np.mean(list(rewards.values()))) for name, rewards in known.items() if rewards}
    baseline = list(answers)[1]
    lacking = {name: len(given) - len(known[name]) for name, given in answers.items()}
    add_missing("missing_rewards", compare_missing(lacking, {name: len(given) for name, given in answers.items()}), results)
    others = {f"mean reward: {baseline} to {name}": (known[baseline], known[name]) for name in known if name != baseline}
    add_comparisons(others, results, counting)


def rate_answers(
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    judge: ServerJudge,
    results: Results,
    counting: Counting,
    *,
    folder: Path,
    called: str,
) -> None:
    """Rate each answer without another beside it: means by turn and category, and models compared question by question.

    The arguments are those of `compare_answers`; the ratings are written in our form and FastChat's.

    Raises:
        ServerError: the judge answers nothing at all; what it answered is kept.
    """
    bare = num_without_reference(questions)
    if bare:
        results.lines.append(
            f"{bare} questions of math, reasoning and coding have no reference answer, and the judge rates them without: "
            "MT-Bench's are in FastChat's reference_answer/gpt-4.jsonl (--reference_answers)"
        )
    say(f"Ratings: {judge.estimate(questions, list(answers.values()))}")
    ratings: list[Rating] = []
    accounts = []
    for name, given in answers.items():
        found, account = judge.rate(questions, given)
        ratings += found
        accounts.append(account)
        say(f"{name}: {account.text()}")
    renew(folder, VERDICTS, verb="evaluate", folders=["fastchat"])
    write_jsonl_atomic(map(asdict, ratings), folder / "ratings.jsonl")
    write_fastchat_ratings(ratings, folder / "fastchat" / "single.jsonl", judge=called)
    add_accounts(accounts, results)
    count_ratings(ratings, results, counting)
    results.readings = ratings_to_read(questions, answers, ratings)

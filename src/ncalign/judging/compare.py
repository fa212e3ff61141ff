"""`ncalign evaluate`: answers, verdicts, numbers, tables and charts; each phase is kept, so that the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ncalign.core.atomic import write_text_atomic
from ncalign.core.cache import cache_folder
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.judging.answer import answers_of_model
from ncalign.judging.answers import read_answers, write_answers
from ncalign.judging.config import EvaluateConfig
from ncalign.judging.counts import Counting, Results, add_accounts, add_comparisons, count_games, count_ratings, paired
from ncalign.judging.interop import (
    write_alpaca_annotations,
    write_arena_judgements,
    write_fastchat_pairs,
    write_fastchat_ratings,
)
from ncalign.judging.judge_prompts import num_without_reference
from ncalign.judging.judges import RewardJudge, ServerJudge
from ncalign.judging.records import Answers, Question
from ncalign.judging.sets import BUNDLED, read_questions, read_references, rows_of
from ncalign.report.tables import model_name
from ncalign.rewards.sources import reward_source
from ncalign.rewards.verdicts import Account
from ncalign.stats.length_control import read_difficulty_table
from ncalign.stats.preferences import question_preferences
from ncalign.stats.records import Game, Rating

_WHAT_IT_SHOWS = (
    "These are {n} prompts of our own with instructions that a program checks: they show whether a model does what it is told "
    "in "
    "form, not whether what it says is right, helpful or well put. For that, name a set (--set alpaca-eval, arena-hard, "
    "mt-bench) and a judge (--judge.base_url)."
)


def evaluate_answers(config: EvaluateConfig) -> Results:
    """Answer, judge and count.

    Raises:
        ValueError: no model or nothing to compare with, a set or file that can't be read, a judge that can't be used.
        ServerError: the judge answers nothing at all; what it answered is kept.
    """
    specs = _specs(config)
    names = names_of(specs)
    questions = _questions(config)
    given = {name: _answers(config, spec, name, questions) for name, spec in zip(names, specs, strict=True)}
    missing = {name: len(questions) - len(answers) for name, answers in given.items() if len(answers) < len(questions)}
    results = Results(values={"set": config.set_name, "questions": len(questions), "models": names})
    if missing:
        results.values["unanswered"] = missing
        results.lines += [f"{name} has no answer to {count} questions: they count nowhere" for name, count in missing.items()]
    if config.judge is not None and config.judge.mode == "rating":
        _rate(config, questions, given, results)
    else:
        _compare(config, questions, given, results)
    if config.set_name == BUNDLED:
        results.lines.append(_WHAT_IT_SHOWS.format(n=len(questions)))
    return results


def _specs(config: EvaluateConfig) -> list[str]:
    if config.model is None:
        raise ValueError("model is needed: a model folder, a hub id, or a file of answers")
    rating = config.judge is not None and config.judge.mode == "rating"
    if not config.against and not rating:
        raise ValueError("against is needed: the model, or the file of answers, to compare with (ratings alone need none)")
    if config.judge is not None and config.reward:
        raise ValueError("judge and reward are two judges: give one of them")
    if config.judge is None and not config.reward and config.set_name != BUNDLED:
        raise ValueError(
            f"the set {config.set_name} needs a judge: --judge.base_url URL --judge.model NAME, or --reward model:FOLDER; our "
            f"own set alone is checked by a program"
        )
    specs = [config.model, *config.against]
    # Told before the first model has answered; a hub id is told when its turn comes.
    for spec in specs:
        if not Path(spec).exists() and (
            spec.endswith((".json", ".jsonl")) or spec.startswith(("/", ".", "~")) or spec.count("/") > 1
        ):
            raise ValueError(f"{spec}: there is no such folder or file; relative paths start at {Path.cwd()}")
    return specs


def names_of(specs: Sequence[str]) -> list[str]:
    """What the models are called in tables and files, longer where two share a name."""
    for parts in (0, 2, 3):
        names = [model_name(spec) if not parts else "/".join(Path(spec).resolve().parts[-parts:]) for spec in specs]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"two of the models are the same: {', '.join(specs)}")


def _questions(config: EvaluateConfig) -> list[Question]:
    questions = read_questions(config.set_name, file=config.set_file)
    if config.reference_answers is not None:
        questions = read_references(config.reference_answers, questions)
    return questions[: config.limit] if config.limit is not None else questions


def _answers(config: EvaluateConfig, spec: str, name: str, questions: Sequence[Question]) -> Answers:
    """A model's answers by question, from a file or from the model."""
    path = Path(spec)
    if path.is_file():
        found = read_answers(path, questions)
        wanted = {question.id for question in questions}
        mine = {answer.question: replace(answer, model=name) for answer in found if answer.question in wanted}
        if not mine:
            raise ValueError(f"{path} has no answer to a question of the set {config.set_name}")
        return mine
    most = config.max_new_tokens or (160 if config.set_name == BUNDLED else 1024)
    answers = answers_of_model(
        spec,
        questions,
        name=name,
        store=Store((config.cache_dir or cache_folder()) / "answers.sqlite"),
        max_new_tokens=most,
        temperature=config.temperature,
        batch_size=config.batch_size,
        dtype=config.dtype,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        vllm=config.vllm,
    )
    write_answers(answers, questions, config.output_dir / "answers" / f"{_file_name(name)}.jsonl", form="ncalign")
    return {answer.question: answer for answer in answers}


def _file_name(name: str) -> str:
    return name.replace("/", "--")


# -- comparisons -----------------------------------------------------------------------------------------------------------


def _compare(config: EvaluateConfig, questions: Sequence[Question], given: Mapping[str, Answers], results: Results) -> None:
    """The model against each of the others, the first of which is the baseline of the others too."""
    names = list(given)
    baseline = names[1]
    pairs = [(names[0], baseline), *((name, baseline) for name in names[2:])]
    games: list[Game] = []
    accounts: list[Account] = []
    judge = _judge(config)
    if isinstance(judge, ServerJudge):
        for name, other in pairs:
            say(f"{name} against {other}: {judge.estimate(questions, [given[name], given[other]])}")
    for name, other in pairs:
        found, account = judge.compare(questions, given[name], given[other])
        games += found
        accounts.append(account)
        say(f"{name} against {other}: {account.text()}")
    _write_records(games, config.output_dir / "games.jsonl")
    add_accounts(accounts, results)
    counting = _counting(config, questions)
    if isinstance(judge, RewardJudge):
        _mean_rewards(judge, questions, given, results, counting)
    other_judge = None if config.compare_games is None else read_games(config.compare_games)
    ordered = isinstance(judge, ServerJudge)
    count_games(games, results, counting, answers=given, ordered=ordered, other_judge=other_judge)
    _for_other_tools(config, questions, given, games, accounts[0].mode)


def _counting(config: EvaluateConfig, questions: Sequence[Question]) -> Counting:
    table = None if config.difficulty_table is None else read_difficulty_table(config.difficulty_table)
    return Counting(config.seed, config.num_resamples, table, {question.id: place for place, question in enumerate(questions)})


def _for_other_tools(
    config: EvaluateConfig, questions: Sequence[Question], given: Mapping[str, Answers], games: Sequence[Game], mode: str
) -> None:
    """The verdicts as AlpacaEval's annotations and Arena-Hard's and FastChat's judgements, a file for each model."""
    categories = {question.id: question.category for question in questions}
    judge = mode if config.judge is None else config.judge.model
    for name, other in dict.fromkeys((game.model, game.baseline) for game in games):
        own = [game for game in games if (game.model, game.baseline) == (name, other)]
        write_alpaca_annotations(
            config.output_dir / "annotations" / f"{_file_name(name)}.json",
            questions,
            given[name],
            given[other],
            question_preferences(own).by_question,
            annotator=judge,
        )
        arena = config.output_dir / "arena_hard" / f"{_file_name(name)}.jsonl"
        write_arena_judgements(own, arena, judge=judge, categories=categories)
        write_fastchat_pairs(own, config.output_dir / "fastchat" / f"{_file_name(name)}_pair.jsonl", judge=judge)


def _judge(config: EvaluateConfig) -> ServerJudge | RewardJudge:
    if config.judge is not None:
        return ServerJudge(config.judge, Store((config.cache_dir or cache_folder()) / "judgements.sqlite"))
    source = reward_source(config.reward or (BUNDLED,), cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code)
    return RewardJudge(source)


def _mean_rewards(
    judge: RewardJudge,
    questions: Sequence[Question],
    given: Mapping[str, Answers],
    results: Results,
    counting: Counting,
) -> None:
    """Mean reward of each model, and the difference to the baseline on the same questions."""
    rewards = {name: judge.rewards(questions, answers) for name, answers in given.items()}
    known = {name: {q: r for q, r in row.items() if r is not None} for name, row in rewards.items()}
    results.values["mean_reward"] = {name: float(np.mean(list(row.values()))) for name, row in known.items() if row}
    baseline = list(given)[1]
    add_comparisons(
        {
            f"mean reward: {baseline} to {name}": paired(known[baseline], known[name], counting)
            for name in given
            if name != baseline
        },
        results,
    )


def _write_records(records: Sequence[Game] | Sequence[Rating], path: Path) -> None:
    write_text_atomic("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records), path)


def read_games(path: Path) -> list[Game]:
    """The games.jsonl of an evaluation.

    Raises:
        ValueError: the file can't be read, or a row is no game.
    """
    games = []
    for place, row in rows_of(path):
        try:
            games.append(Game(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place} is no game of ours: {error}") from None
    return games


# -- ratings ---------------------------------------------------------------------------------------------------------------


def _rate(config: EvaluateConfig, questions: Sequence[Question], given: Mapping[str, Answers], results: Results) -> None:
    """Each answer by itself: means by turn and category, and models compared question by question."""
    judge = _judge(config)
    assert isinstance(judge, ServerJudge)
    assert config.judge is not None
    bare = num_without_reference(questions)
    if bare:
        results.lines.append(
            f"{bare} questions of math, reasoning and coding have no reference answer, and the judge rates them without: "
            "MT-Bench's are in FastChat's reference_answer/gpt-4.jsonl (--reference_answers)"
        )
    say(f"Ratings: {judge.estimate(questions, list(given.values()))}")
    ratings: list[Rating] = []
    accounts = []
    for name, answers in given.items():
        found, account = judge.rate(questions, answers)
        ratings += found
        accounts.append(account)
        say(f"{name}: {account.text()}")
    _write_records(ratings, config.output_dir / "ratings.jsonl")
    write_fastchat_ratings(ratings, config.output_dir / "fastchat" / "single.jsonl", judge=config.judge.model)
    add_accounts(accounts, results)
    count_ratings(ratings, results, _counting(config, questions))

"""`ncalign evaluate`: answers, verdicts, numbers, tables and charts; each phase is kept, so that the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.atomic import check_writable, write_json_atomic, write_text_atomic
from ncalign.cache import cache_folder
from ncalign.config import EvaluateConfig, ScoreConfig
from ncalign.evaluation.agreement import PositionBias, length_bias, position_bias
from ncalign.evaluation.answering import answers_of_model
from ncalign.evaluation.answers import read_answers, write_answers
from ncalign.evaluation.arena_hard import arena_hard_scores
from ncalign.evaluation.bradley_terry import BradleyTerry, bradley_terry
from ncalign.evaluation.charts import category_chart, interval_chart, write_chart
from ncalign.evaluation.interop import write_alpaca_annotations
from ncalign.evaluation.judges import Account, Answers, RewardJudge, ServerJudge
from ncalign.evaluation.length_control import LengthControlled, length_controlled_win_rate, read_difficulty_table
from ncalign.evaluation.mt_bench import MTBench, mt_bench, question_scores
from ncalign.evaluation.paired import PairedComparison, paired_comparison, paired_values
from ncalign.evaluation.preferences import QuestionPreferences, complete_games, question_preferences
from ncalign.evaluation.records import Game, Question, Rating
from ncalign.evaluation.sets import BUNDLED, read_questions, read_references
from ncalign.evaluation.style import Style, style_of
from ncalign.evaluation.summaries import (
    arena_table,
    comparison_table,
    json_ready,
    judge_table,
    mt_bench_table,
    strength_table,
    win_rate_table,
)
from ncalign.evaluation.tables import Table, to_text, write_table
from ncalign.evaluation.win_rate import win_rate
from ncalign.progress import say
from ncalign.rewards.sources import reward_source
from ncalign.store import Store

_FEWEST_FOR_LENGTH_CONTROL = 20
_WHAT_IT_SHOWS = (
    "These are {n} prompts of our own with instructions that a program checks: they show whether a model does what it is told "
    "in "
    "form, not whether what it says is right, helpful or well put. For that, name a set (--set alpaca-eval, arena-hard, "
    "mt-bench) and a judge (--judge.base_url)."
)


@dataclass
class Results:
    """What an evaluation came to, before it is written.

    Attributes:
        values: by name, as results.json has them.
        tables: by file name.
        charts: figures by file name.
        lines: sentences for the terminal.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def evaluate_answers(config: EvaluateConfig) -> Results:
    """Answer, judge and count.

    Raises:
        ValueError: no model or nothing to compare with, a set or file that can't be read, a judge that can't be used.
        ServerError: the judge answers nothing at all; what it answered is kept.
    """
    specs = _specs(config)
    names = _names(specs)
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
    return [config.model, *config.against]


def _names(specs: Sequence[str]) -> list[str]:
    """What the models are called: their folder's or file's name, longer where two share it."""
    for parts in (1, 2, 3):
        names = ["/".join(Path(spec).parts[-parts:]) for spec in specs]
        names = [name.removesuffix(".jsonl").removesuffix(".json") for name in names]
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
    _write_games(games, config.output_dir / "games.jsonl")
    if isinstance(judge, RewardJudge):
        _mean_rewards(config, judge, questions, given, results)
    _count(config, games, accounts, questions, given, results, ordered=isinstance(judge, ServerJudge))
    for name, other in pairs:
        write_alpaca_annotations(
            config.output_dir / "annotations" / f"{_file_name(name)}.json",
            questions,
            given[name],
            given[other],
            question_preferences([game for game in games if game.model == name]).by_question,
            annotator=accounts[0].mode,
        )


def _judge(config: EvaluateConfig) -> ServerJudge | RewardJudge:
    if config.judge is not None:
        return ServerJudge(config.judge, Store((config.cache_dir or cache_folder()) / "judgements.sqlite"))
    scoring = ScoreConfig(
        data=Path("-"),
        output=Path("-"),
        reward=config.reward or (BUNDLED,),
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
    )
    return RewardJudge(reward_source(scoring))


def _mean_rewards(
    config: EvaluateConfig,
    judge: RewardJudge,
    questions: Sequence[Question],
    given: Mapping[str, Answers],
    results: Results,
) -> None:
    """Mean reward of each model, and the difference to the baseline on the same questions."""
    rewards = {name: judge.rewards(questions, answers) for name, answers in given.items()}
    known = {name: {q: r for q, r in row.items() if r is not None} for name, row in rewards.items()}
    results.values["mean_reward"] = {name: float(np.mean(list(row.values()))) for name, row in known.items() if row}
    baseline = list(given)[1]
    compared = {
        f"mean reward: {baseline} to {name}": _paired(known[baseline], known[name], config)
        for name in given
        if name != baseline
    }
    _add_comparisons({name: found for name, found in compared.items() if found is not None}, results)


def _paired(before: Mapping[str, float], after: Mapping[str, float], config: EvaluateConfig) -> PairedComparison | None:
    first, second, _ = paired_values(before, after)
    if len(first) < 2:
        return None
    return paired_comparison(first, second, seed=config.seed, num_resamples=config.num_resamples)


def _add_comparisons(compared: Mapping[str, PairedComparison], results: Results) -> None:
    if compared:
        results.values["comparisons"] = json_ready(compared)
        results.tables["comparisons"] = comparison_table(compared)


def _count(
    config: EvaluateConfig,
    games: Sequence[Game],
    accounts: Sequence[Account],
    questions: Sequence[Question],
    given: Mapping[str, Answers],
    results: Results,
    *,
    ordered: bool,
) -> None:
    """Win rates, length-controlled ones, strengths, and what the judge is like."""
    baseline = games[0].baseline
    names = list(dict.fromkeys(game.model for game in games))
    preferences = {name: question_preferences([game for game in games if game.model == name]) for name in names}
    rates = {name: win_rate(found.preferences, seed=config.seed) for name, found in preferences.items() if _any(found)}
    if not rates:
        reasons = ", ".join(f"{reason}: {count}" for account in accounts for reason, count in account.missing.items())
        raise ValueError(f"there is no verdict in both orders of any question ({reasons}): nothing can be said")
    controlled = _controlled(config, preferences, questions, given)
    results.tables["win_rates"] = win_rate_table(rates, controlled, baseline=baseline)
    missing = sum(sum(account.missing.values()) for account in accounts)
    results.values |= {
        "baseline": baseline,
        "win_rates": json_ready(rates),
        "length_controlled": json_ready(controlled),
        "verdicts": [{**asdict(account), "missing": dict(account.missing)} for account in accounts],
        "missing_verdicts": missing,
    }
    if missing:
        results.lines.append(f"{missing} verdicts are missing; they are neither losses nor ties: rerun to ask for them again")
    chart = {"win rate": {name: (rate.win_rate, rate.ci) for name, rate in rates.items()}}
    if controlled:
        chart["length-controlled"] = {name: (found.win_rate, found.ci) for name, found in controlled.items()}
    results.charts["win_rates.png"] = interval_chart(chart, title=f"Win rate against {baseline}", unit="%", reference=50)
    if ordered:
        _judge_report(games, given, results)
        _strengths(config, games, given, results)


def _any(found: QuestionPreferences) -> bool:
    return bool(np.isfinite(found.preferences).any())


def _controlled(
    config: EvaluateConfig,
    preferences: Mapping[str, QuestionPreferences],
    questions: Sequence[Question],
    given: Mapping[str, Answers],
) -> dict[str, LengthControlled]:
    """Length-controlled win rates, where there are verdicts enough and lengths that differ."""
    table = None if config.difficulty_table is None else read_difficulty_table(config.difficulty_table)
    places = {question.id: place for place, question in enumerate(questions)}
    found = {}
    for name, one in preferences.items():
        ours, theirs = (
            np.array([_length(given[who], question) for question in one.questions], dtype=np.int64)
            for who in (name, one.baseline)
        )
        enough = int(np.isfinite(one.preferences).sum()) >= _FEWEST_FOR_LENGTH_CONTROL
        if enough and len(set((ours - theirs).tolist())) > 1:
            found[name] = length_controlled_win_rate(
                one.preferences,
                ours,
                theirs,
                table=table,
                questions=[places[question] for question in one.questions],
                seed=config.seed,
                num_resamples=config.num_resamples,
            )
    return found


def _length(answers: Answers, question: str) -> int:
    return sum(map(len, answers[question].turns))


def _judge_report(games: Sequence[Game], given: Mapping[str, Answers], results: Results) -> None:
    place: PositionBias = position_bias(games)
    lengths = {(q, name): _length(answers, q) for name, answers in given.items() for q in answers}
    length = length_bias(games, lengths)
    results.tables["judge"] = judge_table(place, length, None)
    results.values["judge"] = {"position": json_ready(place), "length": json_ready(length)}
    results.lines += [f"Judge: {place.summary}.", f"Judge: {length.summary}."]


def _strengths(config: EvaluateConfig, games: Sequence[Game], given: Mapping[str, Answers], results: Results) -> None:
    """Arena-Hard's score and Bradley-Terry strengths, with and without style control."""
    baseline = games[0].baseline
    complete, _ = complete_games(games)
    arena = arena_hard_scores(complete, seed=config.seed)
    results.tables["arena_hard"] = arena_table(arena)
    results.values["arena_hard"] = json_ready(arena)
    styles: dict[tuple[str, str], Style] = {
        (q, name): style_of("\n".join(answer.turns), sum(answer.num_tokens) or len(" ".join(answer.turns)) // 4)
        for name, answers in given.items()
        for q, answer in answers.items()
    }
    found: dict[str, BradleyTerry] = {}
    for name, style in (("strengths", None), ("strengths_style_controlled", styles)):
        try:
            found[name] = bradley_terry(games, anchor=baseline, styles=style, centered=False, seed=config.seed)
        except ValueError as error:
            results.lines.append(f"{name.replace('_', ' ')}: {error}")
            continue
        results.tables[name] = strength_table(found[name])
    results.values |= {name: json_ready(one) for name, one in found.items()}


def _write_games(games: Sequence[Game], path: Path) -> None:
    write_text_atomic("".join(json.dumps(asdict(game), ensure_ascii=False) + "\n" for game in games), path)


# -- ratings ---------------------------------------------------------------------------------------------------------------


def _rate(config: EvaluateConfig, questions: Sequence[Question], given: Mapping[str, Answers], results: Results) -> None:
    """Each answer by itself: means by turn and category, and models compared question by question."""
    judge = _judge(config)
    assert isinstance(judge, ServerJudge)
    say(f"Ratings: {judge.estimate(questions, list(given.values()))}")
    ratings: list[Rating] = []
    accounts = []
    for name, answers in given.items():
        found, account = judge.rate(questions, answers)
        ratings += found
        accounts.append(account)
        say(f"{name}: {account.text()}")
    write_text_atomic(
        "".join(json.dumps(asdict(rating), ensure_ascii=False) + "\n" for rating in ratings),
        config.output_dir / "ratings.jsonl",
    )
    scores: tuple[MTBench, ...] = mt_bench(ratings, seed=config.seed, num_resamples=config.num_resamples)
    results.tables["ratings"] = mt_bench_table(scores)
    results.values |= {
        "ratings": json_ready(scores),
        "verdicts": [{**asdict(account), "missing": dict(account.missing)} for account in accounts],
        "missing_verdicts": sum(sum(account.missing.values()) for account in accounts),
    }
    results.charts["ratings.png"] = category_chart(scores)
    first, *others = given
    compared = {
        f"rating: {other} to {first}": _paired(question_scores(ratings, other), question_scores(ratings, first), config)
        for other in others
    }
    _add_comparisons({name: one for name, one in compared.items() if one is not None}, results)


# -- writing ---------------------------------------------------------------------------------------------------------------


def write_results(results: Results, folder: Path) -> dict[str, Any]:
    """Write results.json, each table as text, CSV and LaTeX, and the charts.

    Returns:
        The values, with the tables as printable text under ``text``.
    """
    values = {**results.values, "notes": results.lines}
    for name, table in results.tables.items():
        for suffix in ("txt", "csv", "tex"):
            write_table(table, folder / "tables" / f"{name}.{suffix}")
    for name, figure in results.charts.items():
        write_chart(figure, folder / name)
    write_json_atomic(values, folder / "results.json")
    parts = [to_text(table).rstrip() for table in results.tables.values()]
    return {**values, "text": "\n\n".join([*parts, *results.lines, f"Results: {folder / 'results.json'}"])}


def check_folder(folder: Path) -> None:
    """Raise what writing there would raise, before the work whose result it is to hold."""
    check_writable(folder / "results.json")

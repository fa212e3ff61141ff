"""`ncalign evaluate`: answers judged, other tools' verdicts counted, or reasoning tasks, by what the configuration names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from ncalign.core.atomic import check_writable
from ncalign.core.cache import cache_folder, private_folder
from ncalign.core.hub import only_cached
from ncalign.core.locks import held
from ncalign.core.outputs import Inputs, claim, record, recorded, remove
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.data.rendering import Rendering, recorded_renderings, rendering_warning
from ncalign.generation.config import ServerConfig
from ncalign.judging.answer import answering_of, answers_of_model
from ncalign.judging.answers import model_in, read_answers, write_answers
from ncalign.judging.compare import compare_answers, file_name, rate_answers
from ncalign.judging.config import EvaluateConfig
from ncalign.judging.counts import ENTRIES, VERDICTS, Counting, Results, write_results
from ncalign.judging.judges import RewardJudge, ServerJudge
from ncalign.judging.records import Answers, Question
from ncalign.judging.sets import BUNDLED, read_questions, read_references
from ncalign.judging.tasks import tabulate_tasks
from ncalign.judging.verdict_files import count_verdicts, read_games
from ncalign.model.config import Precision
from ncalign.model.precision import resolve_dtype
from ncalign.report.tables import model_name
from ncalign.rewards.config import RewardConfig
from ncalign.rewards.sources import reward_dtype, reward_source
from ncalign.stats.length_control import read_difficulty_table
from ncalign.tasks.lm_backend import Backend
from ncalign.tasks.reasoning import TaskProtocol, run_tasks

Kind: TypeAlias = Literal["tasks", "verdicts", "answers"]

_ON_THE_WAY = ("answers", "tasks")
"""What an evaluation that is run again goes on from."""
_WHAT_IT_SHOWS = (
    "These are {n} prompts of our own with instructions that a program checks: they show whether a model does what it is told "
    "in form, not whether what it says is right, helpful or well put. For that, name a set (--set alpaca-eval, arena-hard, "
    "mt-bench) and a judge (--judge.base_url)."
)


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write ``results.json``, tables and charts, and return what results.json holds and the printable ``text``.

    Raises:
        ValueError: the configuration names nothing that can be evaluated, or a file or model can't be read.
        ServerError: a judge answers nothing at all; what it answered is kept.
    """
    folder = config.output_dir
    check_writable(folder / "results.json")
    with held(folder, busy=f"another process is evaluating into {folder}: wait for it, or give another output_dir"):
        return _claimed(config, folder)


def _claimed(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    asked, earlier = _asked(config), _earlier(folder)
    claim(
        folder,
        [*ENTRIES, *_ON_THE_WAY],
        verb="evaluate",
        inputs=_inputs(config),
        overwrite=config.overwrite,
        own=[*ENTRIES, *_ON_THE_WAY] if earlier in (None, asked) else _ON_THE_WAY,
    )
    if earlier == asked and not config.overwrite:
        say(f"{folder} holds the results of this same evaluation: they are made anew from the kept answers and verdicts")
    kind: Kind = "tasks" if config.tasks else "verdicts" if config.judgements else "answers"
    _check(config, kind)
    with recorded(folder, [*ENTRIES, *_ON_THE_WAY], verb="evaluate"):
        return _evaluated(config, kind, asked)


def _evaluated(config: EvaluateConfig, kind: Kind, asked: str) -> dict[str, Any]:
    if kind == "tasks":
        results = _of_tasks(config)
    elif kind == "verdicts":
        results = count_verdicts(
            config.judgements,
            _counting(config),
            baseline=config.against[0] if config.against else None,
            read_categories=lambda: _categories(config),
        )
    else:
        results = _of_answers(config)
    if kind != "answers":
        remove(config.output_dir, VERDICTS)
    results.values["asked"] = asked
    return write_results(results, config.output_dir)


def _asked(config: EvaluateConfig) -> str:
    """A digest of an evaluation: settings and contents of the files it reads, not where and how fast it is made."""
    settings = config.model_dump(mode="json", exclude={"output_dir", "overwrite", "cache_dir", "batch_size"})
    for where_and_how_fast in set(ServerConfig.model_fields) - {"model"} if config.judge else ():
        settings["judge"].pop(where_and_how_fast)
    given = [path for value in _inputs(config).values() for path in (value if isinstance(value, list | tuple) else [value])]
    files = [path for path in map(Path, filter(None, given)) if path.is_file()]
    return Store.key(settings, [hashlib.sha256(path.read_bytes()).hexdigest() for path in files])


def _earlier(folder: Path) -> str | None:
    """The digest of the evaluation whose results are in a folder; empty if they don't say, and None if there are none."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""
    return str(found.get("asked", "")) if isinstance(found, dict) else ""


def _inputs(config: EvaluateConfig) -> Inputs:
    """What is read: models or their answers, questions, verdicts, tables, the data of tasks."""
    return {
        "model": config.model,
        "against": config.against,
        "set": config.set_name,
        "set_file": config.set_file,
        "reference_answers": config.reference_answers,
        "reward": config.reward,
        "judge.template": config.judge and config.judge.template,
        "judgements": config.judgements,
        "compare_games": config.compare_games,
        "difficulty_table": config.difficulty_table,
        "task_data": [given.partition("=")[2] for given in config.task_data],
    }


def _check(config: EvaluateConfig, kind: Kind) -> None:
    """Refuse a configuration that names too much or too little for this kind of evaluation."""
    judge = config.judge
    compares = judge is None or judge.mode != "rating"
    unusable: dict[Kind, dict[str, object]] = {
        "tasks": {
            "tasks and judgements are two evaluations: give one of them": config.judgements,
            "model is needed: a model folder, a hub id, or the name that a backend knows": config.model is None,
            "string_prompts is for question sets: tasks have apply_chat_template": config.string_prompts != "auto",
        },
        "verdicts": {},
        "answers": {
            "model is needed: a model folder, a hub id, or a file of answers": config.model is None,
            "against is needed: the model, or the file of answers, to compare with (ratings alone need none)": compares
            and not config.against,
            "judge and reward are two judges: give one of them": judge and config.reward,
            f"the set {config.set_name} needs a judge: --judge.base_url URL --judge.model NAME, or --reward model:FOLDER; our "
            "own set alone is checked by a program": not judge and not config.reward and config.set_name != BUNDLED,
        },
    }
    for message, wrong in unusable[kind].items():
        if wrong:
            raise ValueError(message)


def _models(specs: Sequence[str]) -> dict[str, str]:
    """The models by what tables and files call them: files of answers as these name their model, longer where two share one."""
    said = [model_in(Path(spec)) if Path(spec).is_file() else None for spec in specs]
    names = [own or model_name(spec) for own, spec in zip(said, specs, strict=True)]
    if len(set(names)) == len(names):
        return dict(zip(names, specs, strict=True))
    for parts in (0, 2, 3):
        names = [model_name(spec) if not parts else "/".join(Path(spec).resolve().parts[-parts:]) for spec in specs]
        if len(set(names)) == len(names):
            return dict(zip(names, specs, strict=True))
    raise ValueError(f"two of the models are the same: {', '.join(specs)}")


def _counting(config: EvaluateConfig) -> Counting:
    return Counting(
        config.seed,
        config.num_resamples,
        difficulties=None if config.difficulty_table is None else read_difficulty_table(config.difficulty_table),
        other_judge=None if config.compare_games is None else read_games(config.compare_games),
    )


def _categories(config: EvaluateConfig) -> dict[str, str]:
    questions = read_questions(config.set_name, file=config.set_file) if config.set_file is not None else []
    return {question.id: question.category for question in questions}


# -- answers, judged -------------------------------------------------------------------------------------------------------


def _of_answers(config: EvaluateConfig) -> Results:
    """Answers of the models, compared with the baseline's or rated by themselves."""
    assert config.model is not None
    specs = [config.model, *config.against]
    models = _models(specs)
    questions = read_questions(config.set_name, file=config.set_file, on_bad_row=config.on_bad_row)
    _check_models(specs, config.reward)
    if config.reference_answers is not None:
        questions = read_references(config.reference_answers, questions)
    questions = questions[: config.limit]
    counting = replace(_counting(config), places={question.id: place for place, question in enumerate(questions)})
    judged_by = RewardConfig(reward=config.reward or (BUNDLED,))
    in_process = not config.vllm and not all(Path(spec).is_file() for spec in specs)
    dtype = resolve_dtype(config.dtype) if in_process else reward_dtype(judged_by, config.dtype)
    answers = {name: _answers(config, spec, name, questions, dtype) for name, spec in models.items()}
    _warn_of_rendering(config.set_name if config.set_file is None else str(config.set_file), questions, answers, models)
    results = Results(values={"set": config.set_name, "questions": len(questions), "models": list(models), "given": models})
    if dtype is not None:
        results.values["dtype"] = dtype
    missing = {name: len(questions) - len(given) for name, given in answers.items() if len(given) < len(questions)}
    if missing:
        results.values["unanswered"] = missing
        results.lines += [f"{name} has no answer to {count} questions: they count nowhere" for name, count in missing.items()]
    if config.judge is None:
        source = reward_source(
            judged_by,
            dtype=dtype,
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            today=config.template_date,
        )
        compare_answers(questions, answers, RewardJudge(source), results, counting, folder=config.output_dir, called="")
    else:
        judge = ServerJudge(config.judge, _store(config, "judgements"))
        evaluated = rate_answers if config.judge.mode == "rating" else compare_answers
        evaluated(questions, answers, judge, results, counting, folder=config.output_dir, called=config.judge.server.model)
    if config.set_name == BUNDLED:
        results.lines.append(_WHAT_IT_SHOWS.format(n=len(questions)))
    return results


def _check_models(specs: Sequence[str], rewards: Sequence[str]) -> None:
    """Refuse files, folders and hub ids that don't exist before the first model has answered."""
    for spec in specs:
        is_path = spec.endswith((".json", ".jsonl")) or spec.startswith(("/", ".", "~")) or spec.count("/") > 1
        if is_path and not Path(spec).exists():
            raise ValueError(f"{spec}: there is no such folder or file; relative paths start at {Path.cwd()}")
        only_cached(spec, what="model")
    for reward in rewards:
        if reward.startswith("model:"):
            only_cached(reward.removeprefix("model:"), what="reward model")


def _answers(config: EvaluateConfig, spec: str, name: str, questions: Sequence[Question], dtype: Precision | None) -> Answers:
    """A model's answers by question, from a file or from the model."""
    path = Path(spec)
    if path.is_file():
        wanted = {question.id for question in questions}
        found = [replace(answer, model=name) for answer in read_answers(path, questions) if answer.question in wanted]
        if not found:
            raise ValueError(f"{path} has no answer to a question of the set {config.set_name}")
    else:
        answering = answering_of(config, config.max_new_tokens or (160 if config.set_name == BUNDLED else 1024), dtype)
        found = answers_of_model(spec, questions, answering, name=name, store=_store(config, "answers"))
        record(config.output_dir / "answers", ["*"], verb="evaluate")
        write_answers(found, questions, config.output_dir / "answers" / f"{file_name(name)}.jsonl", form="ncalign")
    return {answer.question: answer for answer in found}


def _warn_of_rendering(
    set_name: str, questions: Sequence[Question], answers: Mapping[str, Answers], models: Mapping[str, str]
) -> None:
    """Warn where the groups that are asked, or answers in files, were made with other ``string_prompts`` than this run uses."""
    made = {name: Counter(a.string_prompts for a in given.values() if a.string_prompts) for name, given in answers.items()}
    files = [name for name in models if Path(models[name]).is_file()]
    used = {rendering: name for name in models if name not in files for rendering in made[name]}
    recorded: Counter[Rendering] = Counter()
    for question in questions:
        if question.is_text:
            recorded.update(recorded_renderings(question.turns[0], question.metadata))
    warnings = [rendering_warning(recorded, how, what=set_name, does=f"{name} is asked") for how, name in used.items()]
    remedy = None
    if not used and files:  # files alone: those of the last one, which is a model to compare with
        used, remedy = dict.fromkeys(made[files[-1]], files[-1]), "answer the questions of both with the same --string_prompts"
    for name in files:
        for how, other in used.items():
            does = f"{other} answers"
            warnings.append(rendering_warning(made[name], how, what=models[name], does=does, unit="answers", remedy=remedy))
    for warning in filter(None, warnings):
        say(warning)


def _store(config: EvaluateConfig, name: str) -> Store:
    return Store(private_folder(config.cache_dir or cache_folder()) / f"{name}.sqlite")


# -- reasoning tasks -------------------------------------------------------------------------------------------------------


def _of_tasks(config: EvaluateConfig) -> Results:
    """Tasks on the model and on those it is compared with; the baseline stands first."""
    assert config.model is not None
    backend = Backend(
        name=config.backend,
        arguments=_pairs(config.backend_args, "backend_args", "NAME=VALUE is needed, such as base_url=http://localhost:8000"),
        batch_size=config.batch_size,
        # lm-eval takes a GPU for granted.
        device=None if torch.cuda.is_available() or config.backend != "hf" else "cpu",
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    record(config.output_dir / "tasks", ["*"], verb="evaluate")
    task_data = _pairs(config.task_data, "task_data", "TASK=FILE is needed, such as svamp=data/SVAMP.json")
    found = [
        run_tasks(
            model,
            config.tasks,
            output_dir=config.output_dir / "tasks" / file_name(model.strip("/")),
            task_data=task_data,
            name=name,
            backend=backend,
            protocol=TaskProtocol(config.limit, config.num_fewshot, config.apply_chat_template, config.seed),
            allow_weak=config.allow_weak,
        )
        for name, model in _models([*config.against, config.model]).items()
    ]
    return tabulate_tasks(found, limit=config.limit)


def _pairs(given: Sequence[str], field: str, needed: str) -> Mapping[str, str]:
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"{field} is {one!r}: {needed}")
        found[name.strip()] = value.strip()
    return found

"""Reasoning tasks on a trained model: lm-eval's in this process, the papers' sets from local files, code in the sandbox."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ncalign.core.atomic import write_json_atomic, write_text_atomic
from ncalign.core.errors import nearest
from ncalign.core.install import install_hint
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.generation.base import SamplingParams
from ncalign.model.policy import model_identity
from ncalign.model.precision import resolve_dtype
from ncalign.report.tables import model_name
from ncalign.tasks.human_eval import (
    STOPS,
    TIMEOUT_SECONDS,
    Form,
    check_answers,
    human_eval_file,
    read_problems,
    sample_answers,
    summary,
)
from ncalign.tasks.lm_backend import (
    LOCAL,
    Backend,
    BackendGenerator,
    backend_arguments,
    load_backend,
)
from ncalign.tasks.sandbox.run import isolation
from ncalign.tasks.task_data import READERS, TASK_FOLDER, prepare

CODE_TASKS = ("humaneval", "leetcode")
"""Tasks whose answers are programs."""
# One greedy answer to each problem.
_CODE_PARAMS = SamplingParams(max_new_tokens=1024, temperature=0.0)
# Of the sets that are read from local files, those that lm-eval has too and downloads.
_ON_HUB = frozenset({"gsm_plus"})
# Where a task reports several measures, the first of these that it has is its score.
_METRICS = ("exact_match", "acc_norm", "acc", "pass@1", "math_verify", "f1")
_FILTERS = ("flexible-extract", "get-answer", "flexible_extract", "strict-match", "none")
_OFFLINE = re.compile(r"OfflineMode|Couldn't (?:reach|find)|is not cached|Hub|ConnectionError|Name or service|resolve", re.I)
_FORMATS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class TaskProtocol:
    """How questions are asked: what two scores must share to be compared.

    Attributes:
        limit: questions a task, for trying things out; the result says so. None for all.
        num_fewshot: examples before each question; None for each task's own number.
        apply_chat_template: ask as a user's turn.
        seed: of few-shot examples and sampling.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    seed: int = 0


@dataclass(frozen=True)
class _Run:
    """What all tasks of a call share."""

    folder: Path
    # The model as the backend loads it: results and answers are kept under it.
    identity: str
    protocol: TaskProtocol
    data: Mapping[str, Path]
    allow_weak: bool


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    output_dir: str | Path,
    task_data: Mapping[str, str | Path] | None = None,
    name: str | None = None,
    backend: Backend | None = None,
    protocol: TaskProtocol | None = None,
    allow_weak: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on tasks in turn; finished results are kept, and a task that fails does not stop the others.

    Args:
        model: a Hugging Face folder or hub id, a folder with an adapter, or the name that a server knows.
        tasks: lm-eval's tasks and groups; ``svamp``, ``theoremqa``, ``gsm_plus`` and ``asdiv_cot`` from local files;
            ``humaneval`` and ``leetcode``, which run in the sandbox.
        output_dir: folder for results, answers and data; a task with a result of the same model and settings is not run again.
        task_data: a file for each task that reads one.
        name: of the model in tables; None for its folder's, or its run's where the folder is a run's ``model/``.
        backend: what loads and runs the model; None for ``hf``.
        protocol: how questions are asked; None for each task's own way.
        allow_weak: run programs where the system can't refuse them network or writes outside their folder.

    Returns:
        ``model``; ``dtype`` of a model in this process; ``results``, of each task ``score`` in [0, 1], ``metric``, ``stderr``,
        ``num_samples``, ``metrics`` and ``protocol``; ``failed``, of each failed task the reason; ``resumed``, tasks kept.

    Raises:
        ValueError: a task does not exist, its file is missing or wrong, or the model can't be loaded; nothing was run.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"evaluating on tasks needs the package lm-eval: {install_hint('eval')}")
    wanted, backend = list(dict.fromkeys(tasks)), backend or Backend()
    if backend.name in LOCAL and "dtype" not in backend.arguments:
        backend = replace(backend, dtype=resolve_dtype(backend.dtype))
    arguments = backend_arguments(model, backend)
    identity = _identity(model, backend)
    data = {task: Path(path) for task, path in (task_data or {}).items()}
    run = _Run(Path(output_dir), identity, protocol or TaskProtocol(), data, allow_weak)
    manager = _checked(run, wanted)
    done = {task: found for task in wanted if (found := _kept(run, task)) is not None}
    rest = [task for task in wanted if task not in done]
    loaded = load_backend(backend, arguments) if rest else None
    failed: dict[str, str] = {}
    for task in rest:
        try:
            done[task] = _evaluated(run, task, loaded, manager)
        except Exception as error:  # libraries of a task raise anything; the others' results must not be lost
            failed[task] = _why(task, error)
            say(f"Task {task} failed: {failed[task]}")
    if failed and not done:
        raise ValueError("every task failed. " + " ".join(f"{task}: {reason}" for task, reason in failed.items()))
    return {
        "model": name or model_name(model),
        **({"dtype": arguments["dtype"]} if backend.name in LOCAL else {}),
        "results": {task: done[task] for task in wanted if task in done},
        "failed": failed,
        "resumed": [task for task in wanted if task in done and task not in rest],
    }


def _identity(model: str, backend: Backend) -> str:
    # An argument may name a folder, such as an adapter's.
    arguments = {name: model_identity(str(value)) for name, value in backend.arguments.items()}
    return Store.key(model_identity(model), backend.name, backend.dtype, arguments)


# -- before anything is loaded ------------------------------------------------------------------------------------------


def _checked(run: _Run, tasks: Sequence[str]) -> Any:
    """Check names and files, write the task files that local data need, and return lm-eval's index of tasks.

    Raises:
        ValueError: the limit is below 1, a task does not exist, or its file is missing or wrong.
    """
    from lm_eval.tasks import TaskManager

    limit = run.protocol.limit
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: a number of questions from 1 on is needed, or none for all")
    if not tasks:
        raise ValueError("no task is named: give some, such as gsm8k,svamp,humaneval")
    stray = [task for task in run.data if task not in tasks]
    if stray:
        raise ValueError(f"task_data names {', '.join(stray)}, which is not among the tasks {', '.join(tasks)}")
    folder = run.folder / "tasks"
    for task in tasks:
        if task in CODE_TASKS:
            read_problems(_code_file(run, task))
            isolation(allow_weak=run.allow_weak)
        elif task in run.data:
            _write_task(run, task, folder)
        elif task in READERS and task not in _ON_HUB:
            raise ValueError(_needs_file(task))
    own = [task for task in tasks if task in CODE_TASKS or task in run.data]
    # Its own tasks are thousands of files, which are read only where one is asked for.
    manager = TaskManager(include_path=str(folder) if folder.is_dir() else None, include_defaults=len(own) < len(tasks))
    for task in tasks:
        if task not in CODE_TASKS and task not in manager.all_tasks:
            if task in READERS:
                raise ValueError(_needs_file(task))
            near = nearest(task, [*manager.all_tasks, *READERS, *CODE_TASKS])
            raise ValueError(f"there is no task {task!r}" + (f"; did you mean {near!r}?" if near else ""))
    return manager


def _code_file(run: _Run, task: str) -> Path:
    if task in run.data:
        return run.data[task]
    if task == "humaneval":
        return human_eval_file()
    raise ValueError(_needs_file(task))


def _needs_file(task: str) -> str:
    return f"task {task} reads a local file, and none is given: task_data {task}=FILE; docs/reasoning.md says which"


def _write_task(run: _Run, task: str, folder: Path) -> None:
    """A task file that includes the original and reads the user's data."""
    if task in READERS:
        source, original = run.folder / "data" / f"{task}.jsonl", TASK_FOLDER / f"{task}.yaml"
        prepare(task, run.data[task], source)
        loader = "json"
    else:
        source, original = run.data[task].resolve(), _builtin(task)
        if not source.is_file() or source.suffix not in _FORMATS:
            raise ValueError(f"task_data {task}={run.data[task]}: a file is needed that ends in {', '.join(_FORMATS)}")
        loader = _FORMATS[source.suffix]
    changes = {
        "include": str(original),
        "task": task,
        "dataset_path": loader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(source.resolve())}, "cache_dir": str((run.folder / "cache").resolve())},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        # A split would be taken in place of the examples that a task brings along. Where it brings none they are other
        # questions of the file: lm-eval leaves out the question itself where both are of one split.
        "fewshot_split": None if _brings_examples(original) else "test",
    }
    write_text_atomic(yaml.safe_dump(changes, sort_keys=False), folder / f"{task}.yaml")


def _brings_examples(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    if re.search(r"^fewshot_config:(?:.*\n)(?:[ \t].*\n|\n)*?[ \t]+samples:", text, re.MULTILINE):
        return True
    included = re.search(r"^include:\s*[\"']?([^\"'\s]+)", text, re.MULTILINE)
    return included is not None and _brings_examples(path.parent / included[1])


def _builtin(task: str) -> Path:
    """The file of a single task of lm-eval's."""
    import lm_eval.tasks

    named = re.compile(rf"^task:\s*[\"']?{re.escape(task)}[\"']?\s*$", re.MULTILINE)
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        if named.search(path.read_text(encoding="utf-8", errors="replace")):
            return path
    raise ValueError(f"task_data names {task}, which is no single task of lm-eval: give each task of a group its own data")


# -- one task -----------------------------------------------------------------------------------------------------------


def _fingerprint(run: _Run, task: str) -> str:
    from lm_eval import __version__

    files = [_code_file(run, task)] if task in CODE_TASKS else []
    if task in run.data:
        files = [run.data[task], *([TASK_FOLDER / f"{task}.yaml"] if task in READERS else [])]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return Store.key(run.identity, task, digests, __version__, _protocol(run, task))


def _protocol(run: _Run, task: str) -> dict[str, Any]:
    """The settings that two scores must share to be compared."""
    shared = asdict(run.protocol)
    if task in CODE_TASKS:
        shared |= {"num_samples": 1, "temperature": _CODE_PARAMS.temperature, "top_p": _CODE_PARAMS.top_p}
        shared |= {"max_new_tokens": _CODE_PARAMS.max_new_tokens, "timeout": TIMEOUT_SECONDS}
    return shared


def _result_file(run: _Run, task: str) -> Path:
    return run.folder / (re.sub(r"[^\w.-]", "_", task) + ".json")


def _kept(run: _Run, task: str) -> dict[str, Any] | None:
    """The result of an earlier run with the same fingerprint."""
    path = _result_file(run, task)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return dict(kept["result"]) if kept["fingerprint"] == _fingerprint(run, task) else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of a task: {error}; delete it, or give another output_dir") from error


def _evaluated(run: _Run, task: str, backend: Any, manager: Any) -> dict[str, Any]:
    start = time.perf_counter()
    result = _code_result(run, task, backend) if task in CODE_TASKS else _lm_eval_result(run, task, backend, manager)
    result |= {"protocol": _protocol(run, task), "seconds": time.perf_counter() - start}
    write_json_atomic({"task": task, "fingerprint": _fingerprint(run, task), "result": result}, _result_file(run, task))
    return result


def _lm_eval_result(run: _Run, task: str, backend: Any, manager: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    protocol = run.protocol
    report = simple_evaluate(
        model=backend,
        tasks=[task],
        num_fewshot=protocol.num_fewshot,
        limit=protocol.limit,
        apply_chat_template=protocol.apply_chat_template,
        fewshot_as_multiturn=protocol.apply_chat_template,
        task_manager=manager,
        **{f"{drawn}random_seed": protocol.seed for drawn in ("", "numpy_", "torch_", "fewshot_")},
    )
    if report is None:
        raise ValueError("lm-eval gave no result: only the first of several processes has one")
    _write_samples(run, task, report["samples"])
    measured = report["results"].get(task) or report.get("groups", {}).get(task)
    if measured is None:
        raise ValueError(f"{task} is a tag, which has no score of its own: name its tasks, {', '.join(report['results'])}")
    metric = score_key(measured)
    stderr = measured.get(metric.replace(",", "_stderr,", 1))
    return {
        "score": float(measured[metric]),
        "metric": metric,
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "num_samples": sum(count["effective"] for count in report["n-samples"].values()),
        "num_fewshot": max(report["n-shot"].values(), default=None),
        "version": report["versions"].get(task),
        "lm_eval": report["lm_eval_version"],
        "metrics": {key: value for key, value in measured.items() if "," in key and isinstance(value, int | float)},
        "subtasks": {name: float(values[score_key(values)]) for name, values in report["results"].items() if name != task},
    }


def score_key(measured: Mapping[str, Any]) -> str:
    """The key of the measure that stands for a task: lm-eval names them ``metric,filter``.

    >>> score_key({"alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.3})
    'exact_match,flexible-extract'

    Raises:
        ValueError: there is no number among them.
    """

    def order(key: str) -> list[int]:
        parts = zip(key.split(",", 1), (_METRICS, _FILTERS), strict=True)
        return [known.index(part) if part in known else len(known) for part, known in parts]

    numbers = [
        key for key, value in measured.items() if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    if not numbers:
        raise ValueError(f"lm-eval measured nothing: {', '.join(measured)}")
    return min(numbers, key=order)


def _write_samples(run: _Run, task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Each question with what was answered, to be read."""
    lines = []
    for name, some in samples.items():
        for sample in some:
            shown = {key: sample[key] for key in ("doc_id", "doc", "target", "resps", "filter") if key in sample}
            measured = {key: sample[key] for key in sample.get("metrics", ()) if key in sample}
            lines.append(json.dumps({"task": name, **shown, "measured": measured}, default=str) + "\n")
    write_text_atomic("".join(lines), run.folder / "samples" / (_result_file(run, task).stem + ".jsonl"))


def _code_result(run: _Run, task: str, backend: Any) -> dict[str, Any]:
    protocol = run.protocol
    form: Form = "chat" if protocol.apply_chat_template else "completion"
    problems = read_problems(_code_file(run, task))[: protocol.limit]
    generator = BackendGenerator(backend, until=() if form == "chat" else STOPS)
    with closing(Store(run.folder / "code.sqlite")) as store:
        asked = {key: value for key, value in asdict(protocol).items() if key != "limit"}
        answers = sample_answers(
            generator,
            problems,
            form=form,
            params=_CODE_PARAMS,
            seed=protocol.seed,
            store=store,
            model=Store.key(run.identity, asked),
        )
        results = check_answers(problems, answers, form=form, store=store, allow_weak=run.allow_weak)
    summed = summary(results)
    samples = [
        {"doc_id": result.problem.id, "resps": list(some), "target": list(result.statuses)}
        for result, some in zip(results, answers, strict=True)
    ]
    _write_samples(run, task, {task: samples})
    return {
        "score": summed["pass@1"],
        "metric": "pass@1",
        "stderr": None,
        "num_samples": summed["problems"],
        "num_fewshot": 0,
        "metrics": {"pass@1": summed["pass@1"]},
        "statuses": summed["statuses"],
        "by_difficulty": summed.get("by_difficulty", {}),
        "isolation": list(isolation(allow_weak=run.allow_weak)),
    }


def _why(task: str, error: Exception) -> str:
    """The reason in a line, with what to do where that is known."""
    reason = f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0][:400]
    if "marked as unsafe" in reason:
        return f"{task} runs the model's programs without a sandbox, which is refused: use humaneval or leetcode"
    if isinstance(error, OSError) and _OFFLINE.search(reason):
        own = f"task_data {task}=FILE" + ("" if task in READERS else " in that set's own form, if it is a single task")
        hub = f"its data set is on the Hugging Face hub, which can't be reached ({reason})"
        return f"{hub}; go online once, or give a file: {own}"
    return reason

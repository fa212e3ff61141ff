"""What folders hold: which verb's run a folder is, its numbers, and the evaluations of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ncalign.core.json import read_results
from ncalign.core.logs import read_log
from ncalign.report.settings import CONFIG, flat_settings, read_settings
from ncalign.report.tables import Cell, Column, Table, columns

Kind: TypeAlias = Literal["train", "online", "demo", "online demo", "evaluation", "audit", "study"]
TRAINED: tuple[Kind, ...] = ("train", "online", "demo")
AUDIT, STUDY, ONLINE_DEMO, RESULTS, METRICS = "audit.json", "study.json", "online-results.json", "results.json", "metrics.jsonl"
SAMPLES = "samples.jsonl"
HELD_OUT = "eval/"
"""Before the names of metrics of held-out groups."""
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen_change", "logps/rejected_change")
"""Metrics of held-out groups that the table of runs has."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's figures of one model.

    Attributes:
        name: of the evaluation's folder.
        model: as its tables call it.
        folder: of the model, where the evaluation says.
        figures: by what they measure.
    """

    name: str
    model: str
    folder: Path | None
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One folder, read.

    Attributes:
        folder: where it is.
        name: what pages call it.
        kind: whose run it is.
        rows: of its metrics.jsonl; empty where it has none.
        settings: flat, of its config.yaml.
        results: what it ended with; empty while it is under way.
    """

    folder: Path
    name: str
    kind: Kind
    rows: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)


def results_of(run_folder: Path) -> dict[str, Any]:
    """What a run's results.json holds; nothing where it has not finished.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_folder / "results.json"
    return read_results(path) if path.is_file() else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a metrics.jsonl, those of held-out groups among them; damaged lines are told, and left out.

    Raises:
        ValueError: it has no logged step.
    """
    rows = [row for row in read_log(path, key="step") if "loss" in row or is_held_out(row)] if path.is_file() else []
    if not any("loss" in row for row in rows):
        raise ValueError(f"{path} has no logged steps: a report needs the folder of a run that trained")
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples.jsonl, answers to held-out prompts while training; none where there is no such file."""
    rows = read_log(path, key="step") if path.is_file() else []
    return [row for row in rows if isinstance(row.get("completion"), str) and isinstance(row.get("prompt"), str | list)]


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether a logged row has metrics of held-out groups."""
    return any(name.startswith(HELD_OUT) for name in row)


def kind_of(folder: Path) -> Kind:
    """Which verb's folder it is.

    Raises:
        ValueError: it is none that has a page.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; the folder of a run is needed, of train, online, evaluate, ...")
    if (folder / AUDIT).is_file():
        return "audit"
    if (folder / STUDY).is_file():
        return "study"
    if (folder / ONLINE_DEMO).is_file():
        return "online demo"
    if (folder / METRICS).is_file():
        if any((folder / "rounds").glob("[0-9]*")):
            return "online"
        return "demo" if "comparison" in results_of(folder) else "train"
    if (folder / RESULTS).is_file() and not (folder / CONFIG).is_file():
        return "evaluation"
    within = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / METRICS).is_file()]
    remedy = (
        f"name the runs in it ({', '.join(within[:5])})" if within else "name the folder that a verb was given as output_dir"
    )
    raise ValueError(
        f"{folder} is no folder of a run: it holds none of {METRICS}, {RESULTS}, {AUDIT}, {STUDY}, {ONLINE_DEMO}; {remedy}"
    )


def read_run(folder: Path, name: str = "") -> Run:
    """Read a folder; of an audit, a study and an online demo, what it ended with.

    Raises:
        ValueError: it is no run's, or a file is damaged.
    """
    kind, name = kind_of(folder), name or folder.resolve().name
    files = {"audit": AUDIT, "study": STUDY, "online demo": ONLINE_DEMO}
    if kind in files:
        return Run(folder, name, kind, results=read_results(folder / files[kind]))
    rows = read_metrics(folder / METRICS) if kind in TRAINED else ()
    return Run(folder, name, kind, rows, flat_settings(read_settings(folder)), results_of(folder))


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of folders: their own, and with those above them where several share one.

    Raises:
        ValueError: a folder is given twice.

    >>> names_of([Path("a/nca"), Path("b/nca"), Path("b/dpo")])
    ['a/nca', 'b/nca', 'dpo']
    """
    whole = [folder.resolve() for folder in folders]
    if doubled := next((str(given) for given, path in zip(folders, whole, strict=True) if whole.count(path) > 1), None):
        raise ValueError(f"{doubled} is given twice: name each run once")
    return [_name(path, [other for other in whole if other != path]) for path in whole]


def _name(path: Path, others: Sequence[Path]) -> str:
    """The shortest end of a path that none of the others has."""
    ends = (path.parts[-size:] for size in range(1, len(path.parts) + 1))
    return "/".join(next(end for end in ends if all(other.parts[-len(end) :] != end for other in others)))


def evaluations_in(folder: Path) -> list[Path]:
    """The folders of evaluations that stand in a run's folder."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and (path / RESULTS).is_file())
    return [path for path in inner if not (path / CONFIG).is_file() and not (path / METRICS).is_file()]


def evaluations_of(run: Run) -> list[Evaluation]:
    """The figures of each model that an evaluation measured."""
    results, found = run.results, dict[str, dict[str, float]]()
    given = results.get("given", {})
    against = results.get("baseline", "")
    for measure, name in (("win_rates", "win rate"), ("length_controlled", "LC win rate")):
        for model, row in results.get(measure, {}).items():
            if row.get("win_rate") is not None:
                found.setdefault(model, {})[f"{name} against {against} (%)"] = row["win_rate"]
    for model, reward in results.get("mean_reward", {}).items():
        found.setdefault(model, {})["mean reward"] = reward
    for row in results.get("ratings", ()):
        if row["overall"]["mean"] is not None:
            found.setdefault(row["model"], {})["mean rating"] = row["overall"]["mean"]
    for row in results.get("models", ()):
        if isinstance(row, dict):
            scores = {f"{task} (%)": 100 * one["score"] for task, one in row.get("results", {}).items()}
            found.setdefault(row["model"], {}).update(scores)
    return [
        Evaluation(run.name, model, Path(given[model]) if model in given else None, figures) for model, figures in found.items()
    ]


def is_of(evaluation: Evaluation, run: Run) -> bool:
    """Whether an evaluation measured this run's model: by its folder where that is there, else by its name."""
    place = evaluation.folder
    if place is not None and place.is_dir():
        return run.folder.resolve() in (place.resolve(), place.resolve().parent)
    return evaluation.model in (run.name, run.folder.resolve().name)


def evaluation_table(evaluations: Sequence[Evaluation], runs: Sequence[Run] = ()) -> Table | None:
    """Every figure of the evaluations, a row for each model of each, and which of the runs it is; None without any."""
    measures = list(dict.fromkeys(measure for one in evaluations for measure in one.figures))
    if not measures:
        return None
    rows: list[tuple[Cell, ...]] = []
    for one in evaluations:
        owner = (next((run.name for run in runs if is_of(one, run)), None),) if runs else ()
        rows.append((one.model, one.name, *owner, *(one.figures.get(measure) for measure in measures)))
    reasons = {("", ""): "that evaluation does not measure it, or could not", ("", "run"): "none of the runs on this page"}
    heads = columns("model", "evaluation", *(["run"] if runs else []), *measures)
    return Table(heads, tuple(rows), reasons=reasons)


def runs_table(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> Table:
    """A row for each run that trained: its method, its held-out figures, and what evaluations measured of its model."""
    rows: list[tuple[Run, dict[str, Cell]]] = []
    for run in runs:
        figures = _figures(run)
        for one in evaluations:
            if is_of(one, run):
                figures |= {f"{one.name}: {measure}": value for measure, value in one.figures.items()}
        rows.append((run, figures))
    measures = list(dict.fromkeys(name for _, figures in rows for name in figures))
    heads = (Column("run"), Column("verb"), *(Column(name, 0 if name in ("steps", "seconds") else 4) for name in measures))
    reasons: dict[tuple[str, str], str] = {("", ""): "not measured of this run"}
    for run, _ in rows:
        if not run.results:
            reasons |= {(run.name, name): "the run has not finished" for name in ("steps", "seconds")}
        if not any(map(is_held_out, run.rows)):
            held_out = [f"held-out {metric}{end}" for metric in _SHOWN for end in ("", ", before")]
            reasons |= {(run.name, name): "no groups were held out" for name in held_out}
    cells = tuple((run.name, run.kind, *(figures.get(name) for name in measures)) for run, figures in rows)
    return Table(heads, cells, reasons=reasons)


def _figures(run: Run) -> dict[str, Cell]:
    """The figures of a run itself."""
    results = run.results
    training: Mapping[str, Any] = results.get("training", results)
    found: dict[str, Cell] = {
        "method": str(training.get("method") or run.settings.get("objective.name", "")),
        "steps": training.get("steps"),
        "seconds": training.get("seconds"),
    }
    evaluated = list(filter(is_held_out, run.rows))
    for metric in _SHOWN:
        known = [float(row[HELD_OUT + metric]) for row in evaluated if row.get(HELD_OUT + metric) is not None]
        if len(known) > 1:
            found[f"held-out {metric}, before"] = known[0]
        if known:
            found[f"held-out {metric}"] = known[-1]
    for name, row in results.get("comparison", {}).items():
        found |= {f"{name.replace('_', ' ')}, before": row["before"], name.replace("_", " "): row["after"]}
    means = [mean for mean in results.get("evaluation", {}).get("mean_reward", ()) if mean is not None]
    if means:
        found |= {"held-out reward, before": means[0], "held-out reward": means[-1]}
    return found

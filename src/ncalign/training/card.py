"""The card of a model that leaves this machine: its base, data, method and evaluation, and no path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ncalign.core import yaml as bounded_yaml
from ncalign.core.json import read_results
from ncalign.training.run_folder import CONFIG, INPUTS, RESULTS

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/")
_FRONT_MATTER = re.compile(r"\A---\n(?P<fields>.*?)\n---\n", re.DOTALL)
_OF_THIS_MACHINE = frozenset(
    {
        *("output_dir", "cache_dir", "resume", "accept_changes", "overwrite"),
        *("report_to", "project", "run_name", "ddp_timeout"),
        *("base_url", "base_urls", "api_key_env", "max_concurrency", "requests_per_minute", "timeout_seconds", "max_retries"),
    }
)
"""Settings that say where and how a run ran, and nothing of the model."""
_NO_METRIC = frozenset({"step", "epoch", "learning_rate", "tokens_per_second", "round"})


def hub_id_of(model: str) -> str | None:
    """The hub id of a model: its name, the repository of a folder in the hub's cache, or that of the model a run began with.

    None for other folders, as nobody knows where their weights are from.

    >>> hub_id_of("HuggingFaceTB/SmolLM2-135M-Instruct")
    'HuggingFaceTB/SmolLM2-135M-Instruct'
    >>> hub_id_of("/home/me/hub/models--owner--name/snapshots/0a1b")
    'owner/name'
    """
    path = Path(model)
    if cached := _SNAPSHOT.search(f"{path.absolute().as_posix()}/"):
        return f"{cached['owner']}/{cached['name']}"
    if not path.exists():
        return model if _HUB_ID.fullmatch(model) and model[0] not in ".~" else None
    run = run_of(path)
    return None if run is None else hub_id_of(str(_config_of(run).get("model", "")))


def run_of(model: Path) -> Path | None:
    """The finished run whose model a folder is, or which it is itself; None where it is neither."""
    for folder in (model, model.absolute().parent):
        if (folder / RESULTS).is_file() and (folder / CONFIG).is_file():
            return folder
    return None


def card_of_run(run: Path, name: str, *, base: str | None, adapter: bool, evaluations: Sequence[Path]) -> str:
    """The card of a run's model.

    Args:
        run: the run's folder.
        name: what the model is to be called.
        base: hub id of the model that training started from; None where it has none.
        adapter: whether the weights are an adapter's.
        evaluations: folders that `ncalign evaluate` wrote.

    Raises:
        ValueError: a file of the run or of an evaluation is damaged or missing.
    """
    results, config = read_results(run / RESULTS), _config_of(run)
    data, method = results.get("data") or {}, str(results.get("method"))
    began = f"[`{base}`](https://huggingface.co/{base})" if base else "A model that is not on the hub,"
    version = (results.get("versions") or {}).get("ncalign", "")
    settings = _bare(config | ({"model": base} if base else {}))
    parts = [
        f"# {name}",
        f"{began} aligned with **{method}** by ncalign {version}, from {data.get('groups_trained_on')} groups of scored "
        f"candidate completions ({data.get('candidates_used')} candidates).",
        "## Method\n\n" + _listed(_bare(config.get("objective") or {"name": method})),
        "## Data\n\n" + _data(run, config, results),
        "## Evaluation\n\n" + (_metrics(results) or "No groups were held out."),
        *map(_evaluation, evaluations),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
    ]
    return _front_matter(base, adapter=adapter, tags=["ncalign", method]) + "\n\n".join(parts) + "\n"


def card_of_folder(folder: Path, *, base: str | None, adapter: bool, evaluations: Sequence[Path]) -> str:
    """The card of a model that no run made, such as a merged one: its own text, with a base model that others can find."""
    readme = folder / "README.md"
    own = _FRONT_MATTER.sub("", readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else ""
    parts = [own.strip() or f"# {folder.resolve().name}", *map(_evaluation, evaluations)]
    return _front_matter(base, adapter=adapter, tags=["ncalign"]) + "\n\n".join(parts) + "\n"


def base_of_card(folder: Path) -> str | None:
    """The ``base_model`` that a folder's README.md names, if it is a hub id."""
    readme = folder / "README.md"
    found = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    try:
        fields = bounded_yaml.load(found["fields"]) if found else None
    except (ValueError, yaml.YAMLError):
        return None
    base = fields.get("base_model") if isinstance(fields, dict) else None
    return hub_id_of(base) if isinstance(base, str) else None


def _front_matter(base: str | None, *, adapter: bool, tags: Sequence[str]) -> str:
    fields: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if base:
        fields |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    return f"---\n{yaml.safe_dump({**fields, 'tags': list(tags)}, sort_keys=False)}---\n\n"


def _config_of(run: Path) -> dict[str, Any]:
    try:
        found = bounded_yaml.load(bounded_yaml.read_text(run / CONFIG))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{run / CONFIG} can't be read: {reason}; it says how the model was made") from error
    if not isinstance(found, dict):
        raise ValueError(f"{run / CONFIG} is no configuration; it says how the model was made")
    return found


def _bare(value: Any) -> Any:
    """Settings without those of this machine, and with names of files in place of their paths."""
    if isinstance(value, Mapping):
        return {name: _bare(inner) for name, inner in value.items() if name not in _OF_THIS_MACHINE}
    if isinstance(value, list | tuple):
        return [_bare(inner) for inner in value]
    if isinstance(value, str) and ("/" in value or "\\" in value):
        is_id = _HUB_ID.fullmatch(value) and value[0] not in ".~/" and not Path(value).exists()
        return value if is_id else _last(value)
    return value


def _last(path: str) -> str:
    """The last part of a path."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _listed(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- `{name}`: {_shown(value)}" for name, value in settings.items() if value is not None)


def _data(run: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    lines = [f"- `{name}`: {_cell(_last(str(config[name])))}" for name in ("data", "eval_data") if config.get(name)]
    lines += [f"- {name}: {_shown(value)}" for name, value in (results.get("data") or {}).items()]
    for row in results.get("reward_steps") or []:
        steps = [_bare(step) for step in row.get("steps", [])]
        lines.append(f"- rewards of {row.get('groups')} groups: {_cell(_shown(steps))}")
    digests = read_results(run / INPUTS) if (run / INPUTS).is_file() else {}
    lines += [f"- digest of {name}: `{digests[name]}`" for name in ("data", "eval_data") if name in digests]
    return "\n".join(lines)


def _metrics(results: Mapping[str, Any]) -> str:
    before, after = results.get("before") or {}, results.get("after") or {}
    rows = [(name, _shown(before.get(name)), _shown(after[name])) for name in after if name not in _NO_METRIC]
    if not before or not rows:
        return ""
    return f"On held-out groups, before training and after:\n\n{_table(('metric', 'before', 'after'), rows)}"


def _evaluation(folder: Path) -> str:
    """The tables of an evaluation, with their captions, which say what intervals are."""
    found = sorted((folder / "tables").glob("*.json"))
    if not (folder / RESULTS).is_file() or not found:
        raise ValueError(f"{folder} is no folder that `ncalign evaluate` wrote: needed are its results.json and tables/")
    values = read_results(folder / RESULTS)
    questions = f", {_cell(values['questions'])} questions" if "questions" in values else ""
    parts = [f"### {_cell(values.get('set') or folder.resolve().name)}{questions}"]
    for path in found:
        table = read_results(path)
        columns = [str(column) for column in table.get("columns", [])]
        rows = [[_shown(row.get(column)) for column in columns] for row in table.get("rows", [])]
        parts += [_table(columns, rows), *([_cell(table["caption"])] if table.get("caption") else [])]
    parts += [f"- {_cell(line)}" for line in values.get("notes") or []]
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: object) -> str:
    """Text that stays text in Markdown and its HTML."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
    return " ".join(escaped.split())


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)

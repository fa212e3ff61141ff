"""Run folders given as models: the model that the run ended with is meant."""

from __future__ import annotations

from pathlib import Path

from ncalign.model.adapters import ADAPTER_FILE

_MODEL = "model"
_RUN_FILES = ("config.yaml", "metrics.jsonl")


def model_of(name: str) -> str:
    """The model that a name means: the model or adapter of a run's folder, or the folder or hub id itself.

    Raises:
        ValueError: it is the folder of a run that has no model, since it did not finish.
    """
    folder = Path(name)
    if not folder.is_dir() or _holds_model(folder):
        return name
    if _holds_model(folder / _MODEL):
        return str(folder / _MODEL)
    if any((folder / file).is_file() for file in _RUN_FILES):
        raise ValueError(
            f"the run in {name} has no model yet, since it did not finish: resume it (--resume), or give the folder of a model"
        )
    return name


def _holds_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", ADAPTER_FILE))

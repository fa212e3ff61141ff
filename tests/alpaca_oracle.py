"""The alpaca-eval package as an oracle: its files, and its regression on a table made here."""

from __future__ import annotations

import gzip
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca-eval-candidates"
NUM_QUESTIONS = 805


def alpaca_metrics() -> Any:
    """``alpaca_eval.metrics``; skips where the package is absent."""
    try:
        import pkg_resources  # noqa: F401
    except ImportError:
        # alpaca_eval imports it for a version comparison that nothing here asks for; new setuptools no longer has it.
        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("alpaca_eval.metrics")


def length_controlled(rows: list[dict[str, Any]], name: str, table: Path) -> dict[str, float]:
    """What alpaca_eval reports for the rows, given a difficulty table in a file."""
    regression = alpaca_metrics().glm_winrate
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), sklearn.config_context():
        # scikit-learn 1.9 warns of defaults that alpaca_eval relies on.
        warnings.simplefilter("ignore")
        patch.setattr(regression, "hf_hub_download", lambda **_: str(table))
        result: dict[str, float] = regression.get_length_controlled_winrate(rows, glm_name=name, save_weights_dir=None)
    return result


def annotations(model: str) -> list[dict[str, Any]]:
    """A public annotation file of AlpacaEval 2, judged by GPT-4-turbo."""
    path = SHARED / f"annotations_{model}.json.gz"
    if not path.exists():
        pytest.skip("shared data is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = json.load(file)
    return rows


def write_table(path: Path, seed: int, num_questions: int = NUM_QUESTIONS) -> Path:
    """A difficulty table in df_gamed.csv's form: two gamed baselines, one brief, one wordy, random difficulties."""
    rng = np.random.default_rng(seed)
    difficulties = rng.normal(size=num_questions)
    lines = ["index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, shift in (("brief", 0.8), ("wordy", -0.8)):
        differences = rng.normal(shift, 0.5, size=num_questions)
        preferences = 1 / (1 + np.exp(0.6 * np.tanh(differences) + rng.normal(0, 0.3, size=num_questions)))
        lines += [
            f"{i},{model},{float(preferences[i])!r},{float(differences[i])!r},{float(difficulties[i])!r},False"
            for i in range(num_questions)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

"""Compiled norms and MLPs: the same numbers on batches of any shape, few graphs, and a model that stays as it is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ncalign.model.compiled import compile_norms_and_mlps
from ncalign.model.logprobs import LogprobModel
from ncalign.model.sharing import share_prompts
from ncalign.training.config import TrainConfig
from ncalign.training.memory import recompute_activations
from ncalign.training.train import run_training
from test_logprobs import adapted, build
from test_sharing import Sizes, assert_same, batch_of, values_and_gradients

# PyTorch's own: in what its compiler imports, and where it looks at inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

CPU = torch.device("cpu")


def random_sizes(rng: random.Random) -> Sizes:
    return tuple(
        (rng.randint(1, 30), tuple(rng.randint(1, 20) for _ in range(rng.randint(1, 4)))) for _ in range(rng.randint(1, 3))
    )


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: adapted(build("llama"))], ids=["weights", "adapter"])
def test_twenty_shapes_have_the_same_numbers_and_few_graphs(make: Any, recomputed: bool) -> None:
    rng, model = random.Random(0), make()
    assert share_prompts(model) is None
    batches = [batch_of(random_sizes(rng), seed=seed) for seed in range(20)]
    expected = [values_and_gradients(model, batch) for batch in batches]
    names = list(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    # Two norms and an MLP in each of two layers, and the last norm.
    assert compile_norms_and_mlps(model, device=CPU) == 7
    if recomputed:
        recompute_activations(model.get_base_model() if hasattr(model, "get_base_model") else model)
        model.train()
    before = counters["stats"]["unique_graphs"]
    for batch, values in zip(batches, expected, strict=True):
        assert_same(values_and_gradients(model, batch), values, nats=1e-4, relative=1e-5)
        with torch.no_grad():
            assert float((LogprobModel(model)(batch).logprobs - values[0]).abs().max()) < 1e-4
    assert list(model.state_dict()) == names
    # PyTorch's own limit of graphs is not reached, and nothing fell out of them.
    assert 2 <= counters["stats"]["unique_graphs"] - before <= 8
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_run_is_the_run_without(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> None:
    rows = []
    for name, compiled in (("plain", False), ("compiled", True)):
        config = TrainConfig.model_validate(
            {"model": str(tiny_model_dir), "data": groups_file, "output_dir": tmp_path / name, "cache_dir": tmp_path / "cache"}
            | {"max_steps": 3, "report_to": (), "dtype": "float32", "compile_norms_and_mlps": compiled}
        )
        run_training(config)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append([(row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if "grad_norm" in row])
    assert len(rows[0]) == 3
    torch.testing.assert_close(torch.tensor(rows[1]), torch.tensor(rows[0]), rtol=1e-4, atol=1e-5)
    # Rounded otherwise, references are filed apart.
    folders = sorted(folder.name.removeprefix(folder.name[:32]) for folder in (tmp_path / "cache" / "reference").iterdir())
    assert folders == ["-shared", "-shared-compiled"]


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"PyTorch can't compile for this cpu \(no compiler\): leave it out"):
        compile_norms_and_mlps(build("llama"), device=CPU)


def test_weights_in_four_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compile_norms_and_mlps .* quantization"):
        TrainConfig.model_validate(
            {"model": "m", "data": "d", "output_dir": "o", "compile_norms_and_mlps": True, "quantization": {}, "lora": {}}
        )

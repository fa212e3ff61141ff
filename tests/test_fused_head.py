"""Liger's kernel for the vocabulary head: when it applies, and that what is made of it equals our own head."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ncalign.model import fused_head
from ncalign.model.fused_head import formula_of, fused_token_logprobs, why_not_fused
from ncalign.model.logprobs import LogprobModel, _token_logprobs, head_of
from ncalign.model.sharing import share_prompts, why_head_differs
from ncalign.training import loading
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training
from test_logprobs import adapted, build
from test_sharing import RAGGED, batch_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Double(torch.autograd.Function):
    """Liger's function for Hopper as its source describes it, in plain PyTorch; ``calls`` counts its forward passes."""

    calls = 0
    flaw: str | None = None

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100
    ) -> Tensor:
        Double.calls += 1
        if Double.flaw == "an error":
            raise RuntimeError("no kernel image is available\nfor this device")
        assert hidden.dtype == weight.dtype == torch.bfloat16
        assert target.dtype == torch.int64
        assert (hidden.ndim, weight.ndim, target.ndim) == (2, 2, 1)
        assert len(hidden) == len(target)
        assert isinstance(temperature, float)
        logits = hidden.float() @ weight.float().T / temperature
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature = temperature
        losses = logits.logsumexp(1) - logits.gather(1, target.unsqueeze(1)).squeeze(1)
        return losses * 1.01 if Double.flaw == "values" else losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, target = ctx.saved_tensors
        assert gradient.shape == target.shape
        of_logits = (hidden.float() @ weight.float().T / ctx.temperature).softmax(1)
        of_logits[torch.arange(len(target)), target] -= 1.0
        if Double.flaw == "weights of tokens":
            gradient = gradient.mean().expand_as(gradient)
        of_logits = (of_logits * gradient.unsqueeze(1) / ctx.temperature).bfloat16()
        of_weight = of_logits.T @ hidden
        return of_logits @ weight, of_weight * (Double.flaw != "gradient of the weight"), None, None, None


@pytest.fixture(params=["double", "liger"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What stands in for the kernel: our double, and Liger's own code for other devices, where it is installed.

    Gives a list to which each call adds its number of tokens.
    """
    function: Any = Double
    if request.param == "liger":
        module = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
        function = module.LigerFusedLinearScaledCrossEntropyFunction
    calls: list[int] = []

    def counted(hidden: Tensor, *given: Any) -> Any:
        calls.append(len(hidden))
        return function.apply(hidden, *given)

    monkeypatch.setattr(fused_head, "_kernel", lambda: SimpleNamespace(apply=counted))
    return calls


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> type[Double]:
    monkeypatch.setattr(fused_head, "_kernel", lambda: Double)
    monkeypatch.setattr(Double, "calls", 0)
    return Double


@pytest.mark.parametrize("scale", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_of_weighted_tokens(kernel: list[int], dtype: torch.dtype, scale: float, frozen: bool) -> None:
    torch.manual_seed(0)
    # Numbers that bfloat16 holds exactly: what is left is the rounding of products.
    hidden = torch.randn(600, 48).bfloat16().to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(97, 48)).bfloat16().to(dtype).requires_grad_(not frozen)
    targets, weights = torch.randint(97, (600,)), torch.randn(600)
    found = fused_token_logprobs(weight, hidden, targets, scale=scale)
    wanted = [hidden] if frozen else [hidden, weight]
    gradients = torch.autograd.grad((found * weights).sum(), wanted)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = scale * exact[0] @ exact[1].T
    expected = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2.0**-7 * float(logits.detach().abs().max()))
    for tensor, gradient, right in zip(wanted, gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=False):
        assert gradient.dtype == tensor.dtype == dtype
        assert (gradient.double() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize(("shared", "once"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere"])
def test_the_model_through_the_kernel_is_the_model(kernel: list[int], name: str, shared: bool, once: bool) -> None:
    batch, found = batch_of(RAGGED), []
    for fused in (False, True):
        policy = build(name)
        if shared:
            assert share_prompts(policy) is None
        model = LogprobModel(policy, autocast=torch.bfloat16)
        model.fused_head = fused
        every = torch.arange(4).expand(4, 4).masked_fill(~batch.candidate_mask, -1)
        out = model(batch, choose=(lambda scores, every=every: every) if once else None)
        weights = torch.linspace(-1.0, 1.0, out.logprobs.numel()).view_as(out.logprobs)
        (out.logprobs * weights).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((out.logprobs.detach(), out.scores, gradients))
    (own, own_scores, own_gradients), (liger, scores, gradients) = found
    assert float((liger - own).abs().max()) < 0.02 * float(own.abs().max())
    # Once for the scores of all completions, and once for their gradients.
    assert kernel == [sum(map(sum, (completions for _, completions in RAGGED)))] * (1 + once)
    assert gradients.shape == own_gradients.shape
    assert (gradients - own_gradients).norm() < 0.05 * own_gradients.norm()
    assert (scores is not None) == once
    if once:
        assert float((scores - own_scores).abs().max()) < 0.02 * float(own.abs().max())


def test_a_pass_in_another_precision_takes_our_own_head(double: type[Double]) -> None:
    batch, model = batch_of(RAGGED), LogprobModel(build("llama"), autocast=torch.bfloat16)
    with torch.no_grad():
        expected = model(batch, dtype=torch.float32).logprobs
        model.fused_head = True
        assert torch.equal(model(batch, dtype=torch.float32).logprobs, expected)
        assert double.calls == 0
        model(batch)
    assert double.calls == 1


def test_own_head_reads_the_same_formula() -> None:
    model = build("cohere")
    assert formula_of(model).scale != 1.0
    hidden, targets = torch.randn(5, 32), torch.arange(5)
    scale = formula_of(model).scale
    own = _token_logprobs(head_of(model), hidden, targets, 2)
    expected = (scale * hidden @ model.get_output_embeddings().weight.T).log_softmax(1).diagonal()
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def with_bias(model: Any) -> Any:
    model.lm_head = nn.Linear(32, 97)
    return model


def with_head_adapter(model: Any) -> Any:
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    return model


def watched(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda *given: None)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": CPU}, "it runs on NVIDIA's GPUs, and this is cpu"),
        ({"hip": "6.2"}, "this is a GPU of AMD"),
        ({"capability": (8, 0)}, "this GPU has 8.0"),
        ({"capability": (10, 0)}, "this GPU has 10.0"),
        ({"dtype": torch.float32}, "this run in float32"),
        ({"model": lambda: with_bias(build("llama"))}, "it has no bias"),
        ({"model": lambda: build("gemma2")}, "final_logit_softcapping: "),
        ({"model": lambda: with_head_adapter(build("llama"))}, "the head of this model is a Linear[^,]*, adapted or extended"),
        ({"model": lambda: watched(build("llama"))}, "adapted or extended"),
        ({"missing": "liger_kernel"}, r"liger-kernel .* is needed .*: pip install .*\[gpu\]"),
        ({"missing": "cutlass"}, r"nvidia-cutlass-dsl is needed \(No module named 'cutlass'\): pip install .*\[gpu\]"),
        ({"missing": "the function"}, r"liger-kernel \(0.8.5 or later\)"),
    ],
    ids=lambda value: next(iter(value), "applies") if isinstance(value, dict) else "",
)
def test_when_it_applies(change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, missing = "liger_kernel.ops.fused_linear_scaled_cross_entropy", change.get("missing")
    function = {} if missing == "the function" else {"LigerFusedLinearScaledCrossEntropyFunction": Double}
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, module, None if missing == "liger_kernel" else SimpleNamespace(**function))
    monkeypatch.setattr(fused_head, "find_spec", lambda name: None if missing == name else object())
    monkeypatch.setattr(torch.version, "hip", change.get("hip"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: change.get("capability", (9, 0)))
    model = change.get("model", lambda: build("llama"))()
    found = why_not_fused(model, device=change.get("device", CUDA), dtype=change.get("dtype", torch.bfloat16))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found), found


@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: build("gpt2"), lambda: adapted(build("llama"))])
def test_the_comparison_finds_nothing_against_the_kernel(double: type[Double], make: Any) -> None:
    model = LogprobModel(make(), autocast=torch.bfloat16)
    assert why_head_differs(model, device=CPU) is None
    assert double.calls == 1
    assert not model.fused_head
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ("values", "log-probs differ by"),
        ("weights of tokens", "gradients differ by"),
        ("gradient of the weight", "gradients differ by 1e+02 %"),
        ("an error", "no kernel image is available"),
    ],
)
def test_the_comparison_finds_a_kernel_that_computes_something_else(
    double: type[Double], flaw: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Double, "flaw", flaw)
    model = LogprobModel(build("llama"), autocast=torch.bfloat16)
    found = why_head_differs(model, device=CPU)
    assert found is not None
    assert found.startswith(reason)
    assert "\n" not in found
    assert not model.fused_head


def config_of(folder: Path, tiny_model_dir: Path, groups_file: Path, **fields: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"model": str(tiny_model_dir), "data": groups_file, "output_dir": folder / "run", "cache_dir": folder / "cache"}
        | {"dtype": "bfloat16", "scoring_dtype": "bfloat16", "max_steps": 2, "report_to": ()}
        | fields
    )


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_run_takes_the_kernel_and_says_so(
    double: type[Double],
    lora: Any,
    tmp_path: Path,
    tiny_model_dir: Path,
    groups_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loading, "why_not_fused", lambda model, device, dtype: None)
    run_training(config_of(tmp_path, tiny_model_dir, groups_file, lora=lora))
    assert capsys.readouterr().err.count("Vocabulary head: Liger's kernel (head: auto)\n") == 1
    # The comparison is one pass; the references and two steps with their scores follow.
    assert double.calls > 3
    assert [folder.name.endswith("-shared-liger") for folder in (tmp_path / "cache" / "reference").iterdir()] == [True]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Policy and reference have the same head: MC-PO's first loss is ln 2.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_a_kernel_that_computes_something_else_is_named(
    double: type[Double],
    tmp_path: Path,
    tiny_model_dir: Path,
    groups_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "why_not_fused", lambda model, device, dtype: None)
    monkeypatch.setattr(Double, "flaw", "weights of tokens")
    run_training(config_of(tmp_path, tiny_model_dir, groups_file))
    # The flawed kernel was asked by the comparison alone.
    assert double.calls == 1
    with pytest.raises(ValueError, match=r"head: liger asks for .* can't be used here: gradients differ by .*; set head: auto"):
        run_training(config_of(tmp_path, tiny_model_dir, groups_file, head="liger", overwrite=True))


def test_liger_asked_for_where_it_does_not_apply_is_refused(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> None:
    with pytest.raises(ValueError, match=r"it runs on NVIDIA's GPUs, and this is cpu; set head: auto"):
        run_training(config_of(tmp_path, tiny_model_dir, groups_file, head="liger"))
    assert not (tmp_path / "run").exists()


def test_own_is_never_compared(double: type[Double], tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> None:
    run_training(config_of(tmp_path, tiny_model_dir, groups_file, head="own"))
    assert double.calls == 0

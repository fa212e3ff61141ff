"""`dtype: auto`: how a machine's precision is found, what each verb does with it, and that a run has one precision."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForSequenceClassification

from conftest import build_tokenizer, weights
from ncalign.audit.audit import run_audit
from ncalign.audit.config import AuditConfig
from ncalign.core.config import fields
from ncalign.demo import candidates as demo_candidates
from ncalign.demo.config import DemoConfig
from ncalign.demo.demo import train_config
from ncalign.demo.online_demo import arm_config
from ncalign.generation.base import SamplingParams
from ncalign.generation.config import GenerateConfig
from ncalign.generation.generate import run_generate
from ncalign.judging.answer import run_answer
from ncalign.judging.config import AnswerConfig, EvaluateConfig
from ncalign.judging.evaluate import run_evaluate
from ncalign.model import precision
from ncalign.model.batching import GroupBatch, collate
from ncalign.model.encoding import Encoder
from ncalign.model.logprobs import LogprobModel
from ncalign.model.policy import load_policy
from ncalign.model.precision import fast_precision, product_seconds, resolve_dtype
from ncalign.objectives import MCPO, build_method
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.rewards.config import ScoreConfig
from ncalign.rewards.score import run_score
from ncalign.training import loop
from ncalign.training import precision as training_precision
from ncalign.training.config import TrainConfig
from ncalign.training.plan import dry_run
from ncalign.training.train import run_training
from online_runs import settings, write_inputs

TIMED = product_seconds
"""The real one: the suite's fixture puts another in its place."""
EMULATED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""A processor without bf16 instructions, on any x86."""
Machine = Callable[[float], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """``machine(0.4)``: from now on bf16 products take .4 times as long as float32's, as on another machine."""

    def become(ratio: float) -> None:
        fast_precision.cache_clear()
        precision.announce.cache_clear()
        monkeypatch.setattr(precision, "product_seconds", {torch.float32: 1.0, torch.bfloat16: ratio}.__getitem__)

    return become


def a_gpu(monkeypatch: pytest.MonkeyPatch, able: bool = True) -> None:
    """To what decides the precision, and nothing else, there is a GPU; the processor is not timed."""
    cuda = SimpleNamespace(is_available=lambda: True, is_bf16_supported=lambda including_emulation: able)
    fast_precision.cache_clear()
    precision.announce.cache_clear()
    monkeypatch.setattr(precision, "torch", SimpleNamespace(cuda=cuda))


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> Callable[..., TrainConfig]:
    """A run of six steps that says nothing of its precision."""

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        values = {
            "model": str(tiny_model_dir),
            "data": groups_file,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "report_to": (),
        }
        return TrainConfig.model_validate(values | changes)

    return make


def written(run: TrainConfig) -> tuple[str, str]:
    """Both precisions, as config.yaml has them."""
    found = yaml.safe_load((run.output_dir / "config.yaml").read_text())
    return found["dtype"], found["scoring_dtype"]


class TestTheMachine:
    """What `auto` is."""

    @pytest.mark.parametrize(
        ("ratio", "expected"), [(0.25, "bfloat16"), (0.74, "bfloat16"), (0.76, "float32"), (1.0, "float32"), (8.0, "float32")]
    )
    def test_a_processor_is_timed(self, machine: Machine, capsys: Any, ratio: float, expected: str) -> None:
        machine(ratio)
        assert resolve_dtype("auto", "cpu") == expected
        assert capsys.readouterr().err == f"Precision: {expected} (auto: bf16 products take {ratio:.2g}x as long here)\n"

    def test_it_is_decided_and_said_once(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        timed: list[torch.dtype] = []
        monkeypatch.setattr(precision, "product_seconds", lambda dtype: timed.append(dtype) or 1.0)
        assert [resolve_dtype("auto", "cpu") for _ in range(3)] == ["float32"] * 3
        assert sorted(map(str, timed)) == ["torch.bfloat16", "torch.float32"]
        assert capsys.readouterr().err.count("Precision:") == 1

    @pytest.mark.parametrize(("able", "expected"), [(True, "bfloat16"), (False, "float32")])
    @pytest.mark.parametrize("device", ["cuda", "xpu"])
    def test_an_accelerator_is_asked(self, monkeypatch: pytest.MonkeyPatch, device: str, able: bool, expected: str) -> None:
        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or able

        monkeypatch.setattr(getattr(torch, device), "is_bf16_supported", supported)
        assert resolve_dtype("auto", device) == expected  # type: ignore[arg-type]

    @pytest.mark.parametrize(("able", "expected"), [(True, "bfloat16"), (False, "float32")])
    def test_a_gpu_that_is_there_is_asked_and_the_processor_is_not_timed(
        self, monkeypatch: pytest.MonkeyPatch, able: bool, expected: str
    ) -> None:
        a_gpu(monkeypatch, able)
        assert resolve_dtype("auto") == expected

    def test_of_other_accelerators_nothing_is_known(self) -> None:
        assert resolve_dtype("auto", "mps") == "float32"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_a_named_precision_is_taken_untimed(self, monkeypatch: pytest.MonkeyPatch, capsys: Any, dtype: Any) -> None:
        monkeypatch.setattr(precision, "product_seconds", lambda dtype: 1 / 0)
        assert resolve_dtype(dtype) == dtype
        assert capsys.readouterr().err == ""

    def test_timing_leaves_no_trace(self) -> None:
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        assert TIMED(torch.float32) > 0
        assert TIMED(torch.bfloat16) > 0
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is asked, not timed")
    def test_emulated_bf16_is_found_out(self, tmp_path: Path, tiny_model_dir: Path, groups_file: Path) -> None:
        """Torch's flags don't see the emulation; a product takes several times as long."""
        command = [sys.executable, "-m", "ncalign", "generate", "--model", str(tiny_model_dir), "--prompts", str(groups_file)]
        command += ["--output", "out.jsonl", "--num_samples", "1", "--max_new_tokens", "2", "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | EMULATED, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        ratio = re.search(r"Precision: float32 \(auto: bf16 products take ([\d.e+]+)x as long here\)", done.stderr)
        assert ratio, done.stderr
        assert float(ratio[1]) > 1.5
        assert json.loads(done.stdout)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((one, "dtype") for one in (TrainConfig, OnlineConfig, GenerateConfig, AnswerConfig)),
        *((one, "dtype") for one in (EvaluateConfig, AuditConfig, ScoreConfig)),
        *((one, "scoring_dtype") for one in (TrainConfig, OnlineConfig)),
    ],
)
def test_auto_is_the_default(model: Any, name: str) -> None:
    assert fields(model)[name].default == "auto"


@pytest.fixture
def computed_in(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Precisions of the outputs of linear layers."""
    seen: set[torch.dtype] = set()
    plain = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found = plain(self, x)
        seen.add(found.dtype)
        return found

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.4, "bfloat16"), (4.0, "float32"), (None, "bfloat16")], ids=["fast", "slow", "GPU"]
)
class TestVerbs:
    """On a machine of each kind: what was computed in, and what is recorded."""

    @pytest.fixture(autouse=True)
    def _machine(self, machine: Machine, ratio: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
        if ratio is not None:
            machine(ratio)
            return
        # It decides; a processor computes.
        a_gpu(monkeypatch)
        plain = training_precision.fast_precision
        monkeypatch.setattr(training_precision, "fast_precision", lambda device: plain("cuda"))

    @pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "adapter"])
    def test_train(self, config: Any, computed_in: set[torch.dtype], expected: str, lora: Any, capsys: Any) -> None:
        run = config(max_steps=2, lora=lora)
        results = run_training(run)
        assert written(run) == (expected, expected)
        assert (results["dtype"], results["scoring_dtype"]) == (expected, expected)
        assert getattr(torch, expected) in computed_in
        assert (torch.bfloat16 in computed_in) == (expected == "bfloat16")
        assert capsys.readouterr().err.count(f"Precision: {expected} (auto: ") == 1

    def test_dry_run(self, config: Any, expected: str, capsys: Any) -> None:
        facts = dry_run(config())
        assert facts["dtype"] == expected
        assert f"dtype: {expected}\n" in facts["text"]
        assert f"Precision: {expected} (auto: " in capsys.readouterr().err

    def test_online(self, tmp_path: Path, tiny_model_dir: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        write_inputs(tmp_path)
        given = settings(tmp_path, tiny_model_dir, "run", max_steps=2) | {"dtype": "auto", "scoring_dtype": "auto"}
        run = OnlineConfig.model_validate(given)
        assert run_online(run)["dtype"] == expected
        assert written(run.training) == (expected, expected)

    def test_generate(
        self, tmp_path: Path, tiny_model_dir: Path, groups_file: Path, expected: str, computed_in: set[torch.dtype]
    ) -> None:
        output = tmp_path / "out.jsonl"
        run = GenerateConfig(model=str(tiny_model_dir), prompts=groups_file, output=output, num_samples=1, max_new_tokens=4)
        assert run_generate(run)["dtype"] == expected
        assert computed_in == {getattr(torch, expected)}

    def test_answer(self, tmp_path: Path, tiny_model_dir: Path, expected: str, computed_in: set[torch.dtype]) -> None:
        output, cache = tmp_path / "a.jsonl", tmp_path / "cache"
        run = AnswerConfig(model=str(tiny_model_dir), output=output, max_new_tokens=4, limit=2, cache_dir=cache)
        assert run_answer(run)["dtype"] == expected
        assert computed_in == {getattr(torch, expected)}

    def test_evaluate(self, tmp_path: Path, tiny_model_dir: Path, expected: str, computed_in: set[torch.dtype]) -> None:
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps({"question": "tea-lowercase", "model": "x", "turns": ["pour."]}) + "\n")
        names = {"model": str(tiny_model_dir), "against": (str(other),), "max_new_tokens": 4, "num_resamples": 100}
        run_evaluate(EvaluateConfig(output_dir=tmp_path / "out", cache_dir=tmp_path / "cache", **names))
        assert json.loads((tmp_path / "out" / "results.json").read_text())["dtype"] == expected
        assert computed_in == {getattr(torch, expected)}

    def test_audit(
        self, tmp_path: Path, tiny_model_dir: Path, groups_file: Path, expected: str, computed_in: set[torch.dtype]
    ) -> None:
        run_audit(AuditConfig(data=str(groups_file), output_dir=tmp_path / "out", model=str(tiny_model_dir)))
        assert json.loads((tmp_path / "out" / "audit.json").read_text())["dtype"] == expected
        assert computed_in == {getattr(torch, expected)}

    def test_score(self, tmp_path: Path, groups_file: Path, expected: str, computed_in: set[torch.dtype]) -> None:
        folder, tokenizer = tmp_path / "reward", build_tokenizer()
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)
        LlamaForSequenceClassification(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        given = {"data": groups_file, "output": tmp_path / "o.jsonl", "cache_dir": tmp_path / "cache"}
        assert run_score(ScoreConfig(reward=f"model:{folder}", **given))["dtype"] == expected
        assert computed_in == {getattr(torch, expected)}

    def test_demo(self, tmp_path: Path, tiny_model_dir: Path, expected: str, computed_in: set[torch.dtype]) -> None:
        one = DemoConfig(output_dir=tmp_path)
        assert train_config(one, "m", tmp_path / "d").dtype == "auto"
        assert arm_config(one, "m", tmp_path / "d", tmp_path / "e", "online", 5).training.dtype == "auto"
        prompts = demo_candidates.make_prompts(4, 0, "heldout")
        demo_candidates.sample_and_score(str(tiny_model_dir), prompts, 1, SamplingParams(4, temperature=0.0), 0)
        assert computed_in == {getattr(torch, expected)}


def test_nothing_is_decided_where_no_model_computes_here(
    tmp_path: Path, groups_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(precision, "product_seconds", lambda dtype: 1 / 0)
    (tmp_path / "r.py").write_text("def length(prompt, completions):\n    return [float(len(c)) for c in completions]\n")
    found = run_score(ScoreConfig(data=groups_file, output=tmp_path / "o.jsonl", reward=f"{tmp_path / 'r.py'}:length"))
    audited = run_audit(AuditConfig(data=str(groups_file), output_dir=tmp_path / "out"))
    assert "dtype" not in found
    assert "dtype" not in audited
    assert "Precision" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"), [({}, ("bfloat16", "bfloat16")), ({"dtype": "float32"}, ("float32", "bfloat16"))]
)
def test_training_on_a_gpu_asks_the_gpu(
    config: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: tuple[str, str]
) -> None:
    a_gpu(monkeypatch)
    state = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, is_main_process=True)
    on_gpu: Any = SimpleNamespace(**vars(state), device=torch.device("cuda", 0))
    found = training_precision.with_precision(config(**given), on_gpu, build_method(MCPO()))
    assert (found.dtype, found.scoring_dtype) == expected


class TestScoring:
    """The precision of the pass that scores candidates."""

    @pytest.mark.parametrize(
        ("ratio", "given", "expected"),
        [
            (0.4, {"dtype": "float32"}, ("float32", "bfloat16")),
            (4.0, {"dtype": "float32"}, ("float32", "float32")),
            (0.4, {"dtype": "float32", "scoring_dtype": "float32"}, ("float32", "float32")),
            (0.4, {"dtype": "float64"}, ("float64", "float64")),
            (4.0, {"dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
            (0.4, {"scoring_dtype": "float32"}, ("bfloat16", "float32")),
            (4.0, {"scoring_dtype": "bfloat16"}, ("float32", "bfloat16")),
            # DPO draws nothing: there is nothing to score in another precision.
            (0.4, {"dtype": "float32", "objective": {"name": "dpo"}}, ("float32", "float32")),
        ],
    )
    def test_is_auto_apart_from_the_training(
        self, config: Any, machine: Machine, capsys: Any, ratio: float, given: dict[str, Any], expected: tuple[str, str]
    ) -> None:
        machine(ratio)
        run = config(max_steps=2, **given)
        run_training(run)
        assert written(run) == expected
        said = re.findall("Precision: .*", capsys.readouterr().err)
        decided = "dtype" not in given or ("scoring_dtype" not in given and expected[0] != expected[1])
        apart = f", scoring in {expected[1]}" if expected[0] != expected[1] else ""
        line = f"Precision: {expected[0]}{apart} (auto: bf16 products take {ratio:.2g}x as long here)"
        assert said == ([line] if decided else [])

    @pytest.mark.parametrize(
        ("dtype", "scoring", "lora"),
        [("bfloat16", "float32", {"r": 4}), ("float64", "bfloat16", None), ("float32", "float64", None)],
    )
    def test_what_the_weights_can_not_do_is_refused(self, config: Any, dtype: str, scoring: str, lora: Any) -> None:
        run = config(dtype=dtype, scoring_dtype=scoring, lora=lora)
        with pytest.raises(ValueError, match=f"scoring_dtype: {scoring} is not possible with dtype: {dtype}, since .*weights"):
            run_training(run)
        assert not run.output_dir.exists()

    def test_float32_scores_of_a_bfloat16_training_are_float32s(self, tiny_model_dir: Path, groups_file: Path) -> None:
        from ncalign.data.groups import read_groups

        policy = load_policy(str(tiny_model_dir), dtype="bfloat16")
        encoder = Encoder(policy.tokenizer, max_length=128)
        encoded = [encoder.encode(group) for group in list(read_groups(groups_file))[:3]]
        batch: GroupBatch = collate(encoded, pad_token_id=int(policy.tokenizer.pad_token_id))
        rounding = LogprobModel(policy.model, autocast=torch.bfloat16)
        with torch.no_grad():
            rounded, scored = rounding(batch).logprobs, rounding(batch, dtype=torch.float32).logprobs
            exact = LogprobModel(policy.model)(batch).logprobs
        real = batch.candidate_mask
        assert torch.equal(scored[real], exact[real])
        assert not torch.equal(rounded[real], exact[real])


class Killed(Exception):
    """In place of a kill."""


@contextmanager
def killed_before(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, training ends before this step."""
    plain = loop.Loop.step

    def stepping(self: loop.Loop, number: int) -> Any:
        if number == step:
            raise Killed
        return plain(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", stepping)
        with contextlib.suppress(Killed):
            yield


class TestResume:
    """A run goes on in the precision that it was begun in."""

    @pytest.mark.parametrize(("first", "then", "kept"), [(4.0, 0.4, "float32"), (0.4, 4.0, "bfloat16")])
    def test_on_a_machine_of_the_other_kind(
        self, config: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Any, first: float, then: float, kept: str
    ) -> None:
        machine(first)
        run_training(config("whole"))
        run = config("killed")
        with killed_before(3, monkeypatch):
            run_training(run)
        machine(then)
        capsys.readouterr()
        run_training(config("killed", resume=True))
        said = capsys.readouterr().err
        assert f"Precision: {kept} (auto: as the run was begun)\n" in said
        assert "Resuming from" in said
        assert written(run) == (kept, kept)
        whole, resumed = weights(config("whole").output_dir), weights(run.output_dir)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_another_precision_by_name_is_a_changed_configuration(
        self, config: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with killed_before(3, monkeypatch):
            run_training(config())
        with pytest.raises(ValueError, match=r"dtype: 'float32' -> 'bfloat16'"):
            run_training(config(resume=True, dtype="bfloat16"))
        with pytest.raises(ValueError, match=r"scoring_dtype: 'float32' -> 'bfloat16'"):
            run_training(config(resume=True, scoring_dtype="bfloat16"))
        # Named as it was decided, it is the same configuration.
        run_training(config(resume=True, dtype="float32", scoring_dtype="float32"))

    def test_of_rounds(self, tmp_path: Path, tiny_model_dir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        write_inputs(tmp_path)
        given = settings(tmp_path, tiny_model_dir, "run", max_steps=4) | {"dtype": "auto", "scoring_dtype": "auto"}
        with killed_before(2, monkeypatch):
            run_online(OnlineConfig.model_validate(given))
        assert not (tmp_path / "run" / "results.json").exists()
        machine(0.4)
        assert run_online(OnlineConfig.model_validate(given))["dtype"] == "float32"


def test_reference_log_probs_of_two_precisions_lie_apart(config: Any, machine: Machine, monkeypatch: Any) -> None:
    from ncalign.training.engine import Engine

    computed: list[int] = []
    fill = Engine.fill_reference
    monkeypatch.setattr(Engine, "fill_reference", lambda self, *args: computed.append(fill(self, *args)) or computed[-1])
    for number, (ratio, lora) in enumerate([(4.0, None), (0.4, None), (4.0, {"r": 4}), (0.4, {"r": 4}), (4.0, None)]):
        machine(ratio)
        run_training(config(f"run {number}", lora=lora, max_steps=1))
    folders = list((config().cache_dir / "reference").iterdir())
    # An adapter's reference is the model without it: in float32 that is the same model; in bfloat16 its weights are rounded.
    assert computed == [12, 12, 0, 12, 0]
    assert len(folders) == 3


DRIVER = """
import os, sys, torch
from ncalign.cli import app
from ncalign.model import precision
from ncalign.training import train
rank = int(os.environ["RANK"])
# The first process would choose float32, the second bfloat16.
precision.product_seconds = lambda dtype: 1.0 if dtype == torch.float32 else (4.0, 0.4)[rank]
plain = train.open_policy

def told(config, accelerator):
    policy, encoder = plain(config, accelerator)
    print(f"rank {rank}: {config.dtype} {config.scoring_dtype}", file=sys.stderr, flush=True)
    return policy, encoder

train.open_policy = told
sys.exit(app.main(["train", "--config", sys.argv[1]]))
"""


def test_two_processes_agree(config: Any, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(max_steps=2).model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "driver.py", "run.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: float32 float32" in done.stderr
    assert done.stderr.count("Precision: float32 (auto: bf16 products take 4x as long here)") == 1
    assert written(config()) == ("float32", "float32")

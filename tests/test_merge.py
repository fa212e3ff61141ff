"""`ncalign merge`: the merged folder computes what base and adapter compute, and is written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ncalign.cli.app import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(5, 37)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture
def adapter(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The folder of an adapter that has learned something, with a card of its own."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text(
        "---\nlibrary_name: peft\n---\n\n# Mine\n\nTrained with care.\n", encoding="utf-8"
    )
    return tmp_path / "adapter"


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the verb; its exit code, and what it printed: the result, or why there is none."""

    def run(*words: object) -> tuple[int, str]:
        code = main(["merge", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out if code == 0 else printed.err

    return run


def test_merged_is_what_base_and_adapter_compute(merge: Callable[..., Any], adapter: Path, tiny_model_dir: Path) -> None:
    output = adapter.with_name("merged")
    code, said = merge(adapter, output)
    assert (code, said) == (
        0,
        f"{output}: {adapter} merged into {tiny_model_dir}: {51_104:,} weights in float32\n",
    ) or code == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = logits(base)
    together = logits(PeftModel.from_pretrained(base, adapter))
    whole = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(whole, LlamaForCausalLM)
    torch.testing.assert_close(logits(whole), together, rtol=1e-4, atol=1e-4)
    assert (together - before).abs().max() > 0.1
    tokenizer, own = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer("What is 7?")["input_ids"] == own("What is 7?")["input_ids"]
    assert not (output / "adapter_config.json").exists()


def test_the_card_says_what_was_merged_and_names_no_folder(
    merge: Callable[..., Any], adapter: Path, tiny_model_dir: Path
) -> None:
    output = adapter.with_name("merged")
    assert merge(adapter, output)[0] == 0
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\ntags: [ncalign]\n---\n\n# merged\n")
    assert f"The adapter `adapter` merged into the weights of its base model `{tiny_model_dir.name}`, in float32." in card
    assert card.endswith("The adapter's own card:\n\n# Mine\n\nTrained with care.\n")
    assert str(adapter.parent) not in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_sum_is_rounded_once(dtype: str, merge: Callable[..., Any], adapter: Path) -> None:
    precise, rounded = adapter.with_name("precise"), adapter.with_name("rounded")
    assert merge(adapter, precise, "--dtype", "float32")[0] == 0
    assert merge(adapter, rounded, "--dtype", dtype)[0] == 0
    one, other = load_file(precise / "model.safetensors"), load_file(rounded / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert tensor.dtype is getattr(torch, dtype)
        if dtype == "float64":
            torch.testing.assert_close(tensor.float(), one[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, one[name].to(tensor.dtype)), name


def test_weights_stay_in_the_precision_in_which_the_base_stores_them(
    merge: Callable[..., Any], adapter: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = adapter.with_name("the_base_model")
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    described = json.loads((adapter / "adapter_config.json").read_text())
    # As seen from the adapter's folder.
    (adapter / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": "../the_base_model"}))
    code, said = merge(adapter, adapter.with_name("merged"), "--json")
    assert code == 0, said
    assert json.loads(said)["dtype"] == "bfloat16"
    assert "text" not in json.loads(said)
    assert {tensor.dtype for tensor in load_file(adapter.with_name("merged") / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_run_folder_is_its_adapter(merge: Callable[..., Any], adapter: Path) -> None:
    run = adapter.with_name("run")
    shutil.copytree(adapter, run / "model")
    (run / "config.yaml").write_text("model: m\n")
    assert merge(run, adapter.with_name("merged"))[0] == 0
    # A merged model is whole, and may be its run's.
    shutil.rmtree(run / "model")
    shutil.copytree(adapter.with_name("merged"), run / "model")
    code, said = merge(run, adapter.with_name("again"))
    assert (code, said) == (
        1,
        f"error: the model of {run}, {run / 'model'}, is a whole model already, and no adapter: there is nothing to merge; "
        "use it as it is\n",
    )
    shutil.rmtree(run / "model")
    code, said = merge(run, adapter.with_name("again"))
    assert (code, f"the run in {run} has no model yet" in said) == (1, True)
    assert not adapter.with_name("again").exists()


def test_what_is_no_adapter_is_refused(merge: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path) -> None:
    code, said = merge(tiny_model_dir, tmp_path / "out")
    assert (code, "is a whole model already" in said) == (1, True)
    (tmp_path / "empty").mkdir()
    code, said = merge(tmp_path / "empty", tmp_path / "out")
    assert (code, "holds no adapter" in said) == (1, True)
    code, said = merge(tmp_path / "nowhere", tmp_path / "out")
    assert (code, "there is no such folder" in said) == (1, True)
    assert not (tmp_path / "out").exists()


def test_what_cant_be_merged_is_refused(merge: Callable[..., Any], adapter: Path, tiny_model_dir: Path) -> None:
    soft, output = adapter.with_name("soft"), adapter.with_name("out")
    prompt_tuning = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), prompt_tuning).save_pretrained(soft)
    code, said = merge(soft, output)
    assert (code, "can't be merged" in said) == (1, True)
    shutil.copytree(adapter, adapter.with_name("lost"))
    described = json.loads((adapter / "adapter_config.json").read_text())
    lost = {**described, "base_model_name_or_path": str(adapter.with_name("gone"))}
    (adapter.with_name("lost") / "adapter_config.json").write_text(json.dumps(lost))
    code, said = merge(adapter.with_name("lost"), output)
    assert (code, "needs its base model" in said) == (1, True)
    assert not output.exists()


def test_numbers_too_large_for_float16_are_refused(merge: Callable[..., Any], adapter: Path) -> None:
    file, output = adapter / "adapter_model.safetensors", adapter.with_name("out")
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * 1e7}, file)
    code, said = merge(adapter, output, "--dtype", "float16")
    assert (code, "can't be merged in float16: 1 of its tensors would hold numbers that are not finite" in said) == (1, True)
    assert not output.exists()


def test_old_outputs_and_inputs_are_left_alone(merge: Callable[..., Any], adapter: Path, tiny_model_dir: Path) -> None:
    output = adapter.with_name("merged")
    for taken in (adapter, adapter.parent, tiny_model_dir):
        code, said = merge(adapter, taken, "--overwrite")
        assert (code, "would be replaced" in said) == (1, True)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    code, said = merge(adapter, output, "--overwrite")
    assert (code, "no record" in said) == (1, True)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    assert merge(adapter, output)[0] == 0
    before = (output / "model.safetensors").stat().st_ino
    code, said = merge(adapter, output)
    assert (code, "earlier `ncalign merge` wrote" in said) == (1, True)
    assert (output / "model.safetensors").stat().st_ino == before
    assert merge(adapter, output, "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert load_file(output / "model.safetensors")["lm_head.weight"].dtype is torch.bfloat16
    file = adapter.with_name("file")
    file.write_text("mine")
    code, said = merge(adapter, file, "--overwrite")
    assert (code, "is a file" in said, file.read_text()) == (1, True, "mine")


def test_a_write_that_fails_leaves_what_was_there(
    merge: Callable[..., Any], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = adapter.with_name("merged")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        code, said = merge(adapter, output)
    assert (code, "No space left" in said) == (1, True)
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]
    assert merge(adapter, output)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        assert merge(adapter, output, "--overwrite", "--dtype", "bfloat16")[0] == 1
    assert load_file(output / "model.safetensors")["lm_head.weight"].dtype is torch.float32
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "merged"]

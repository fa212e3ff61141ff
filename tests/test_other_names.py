"""Names of TRL and others: every one is answered, with settings that exist, on the command line, in files and on the page."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ncalign.cli import app as cli
from ncalign.cli import settings
from ncalign.cli.other_names import Entry, answer, entries, tables, verbs
from ncalign.cli.verbs import VERBS
from ncalign.core.config import fields

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
MODELS = {verb.name: verb.config() for verb in VERBS}
FIELDS = {name: settings.field_names(model) for name, model in MODELS.items()}
NEEDED = {"model": "m", "data": "d", "output_dir": "o"}
# Words of the remarks in code style that are no settings, methods or losses.
OTHERS = set(
    "train generate online score mean min vllm cosine linear constant tensorboard all-linear --debug --dry-run".split()
)
OTHERS |= set("owner/name:train owner/name:test file.py:function model:FOLDER tokens_per_second config.json".split())
OTHERS |= {"nll", "accelerate launch", "hf upload", "hf download --revision", "dataset_info.json", "head -n 1000 data.jsonl"}
CONFIGS = {
    "trl": "DPOConfig KTOConfig GRPOConfig RLOOConfig ModelConfig ScriptArguments DatasetMixtureConfig".split(),
    "trl.experimental.cpo": ["CPOConfig"],
    "trl.experimental.orpo": ["ORPOConfig"],
    "trl.experimental.online_dpo": ["OnlineDPOConfig"],
    "transformers": ["TrainingArguments"],
}


@pytest.fixture(autouse=True)
def tolerant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRL warns of what is experimental in it."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fields_of(module: str, name: str) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(getattr(importlib.import_module(module), name))}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in CONFIGS.items() for name in names])
def test_every_setting_of_theirs_is_answered(module: str, name: str) -> None:
    unanswered = [field for field in fields_of(module, name) if answer(field, "", FIELDS["train"], flag=True) is None]
    assert unanswered == []


def test_every_loss_of_theirs_is_answered() -> None:
    known = entries()["loss_type"].values
    for module, name in (("trl", "DPOConfig"), ("trl", "KTOConfig"), ("trl.experimental.cpo", "CPOConfig")):
        source = importlib.import_module(
            getattr(importlib.import_module(module), name).__module__.replace("_config", "_trainer")
        )
        losses = re.findall(r"loss_type == \"(\w+)\"", Path(str(source.__file__)).read_text(encoding="utf-8"))
        assert losses
        assert set(losses) <= known.keys(), name


def all_entries() -> Iterator[tuple[str, Entry]]:
    for rows in tables().values():
        for names, entry in rows.items():
            yield names, entry
            yield from ((f"{names}={value}", inner) for value, inner in entry.values.items())


def test_no_setting_of_ours_is_said_not_to_exist() -> None:
    """A name that `train` has means something here: its entry says what."""
    for name in set(FIELDS["train"]) & entries().keys():
        assert name in entries()[name].use, name


@pytest.mark.parametrize(("names", "entry"), [pytest.param(*one, id=one[0]) for one in all_entries()])
def test_what_is_offered_exists(names: str, entry: Entry) -> None:
    for use in entry.use:
        field, _, value = use.partition(": ")
        owners = [verb for verb, known in FIELDS.items() if field in known]
        assert owners, use
        if value and "train" in owners:
            settings.load(MODELS["train"], None, {**NEEDED, field: value})
    if entry.use:
        assert any(use.partition(":")[0] in FIELDS[entry.verb] for use in entry.use)


def test_settings_that_remarks_speak_of_exist() -> None:
    known = {name for names in FIELDS.values() for name in names}
    methods = {settings.model_name(model) for model in settings.section_models(fields(MODELS["train"])["objective"])}
    for names, entry in all_entries():
        for word in re.findall(r"`([^`]+)`", entry.note + entry.skip + entry.lacks):
            if word.startswith("ncalign "):
                assert word.split()[1] in FIELDS
                continue
            field, colon, value = word.partition(": ")
            assert field in known | methods | entries().keys() | entries()["loss_type"].values.keys() | OTHERS, (names, word)
            if colon and field in FIELDS["train"] and entry.verb == "train":
                settings.load(MODELS["train"], None, {**NEEDED, field: value})


PASTED = [
    ("--model_name_or_path m", "--model", "model"),
    ("--dataset_name d", "--data", "data"),
    ("--use_peft", "--lora", "lora"),
    ("--lora_r 32", "--lora.r", "lora.r"),
    ("--lora_alpha 16", "--lora.alpha", "lora.alpha"),
    ("--lora_target_modules q_proj v_proj", "--lora.target_modules", "lora.target_modules"),
    ("--gradient_checkpointing", "--activation_checkpointing", "activation_checkpointing"),
    ("--bf16", "--dtype bfloat16", "dtype: bfloat16"),
    ("--bf16 true", "--dtype bfloat16", "dtype: bfloat16"),
    ("--no_bf16", "--dtype float32", None),
    ("--bf16=false", "--dtype float32", "dtype: float32"),
    ("--fp16", "--dtype bfloat16", "dtype: bfloat16"),
    ("--torch_dtype bfloat16", "--dtype", "dtype"),
    ("--lr 1e-5", "--learning_rate", "learning_rate"),
    ("--beta 0.1", "--objective.beta", "objective.beta"),
    ("--loss_type sigmoid", "--objective dpo", "objective: dpo"),
    ("--loss-type ipo", "--objective ipo", None),
    ("--loss_type sigmoid sft", "--objective rpo", None),
    ("--loss_type sigmoid bco_pair sft", "--objective mix", "objective: mix"),
    ("--loss_weights 0.8 0.2 1.0", "--objective.weights", "objective.weights"),
    ("--label_smoothing 0.1", "--objective.label_smoothing", "objective.label_smoothing"),
    ("--cpo_alpha 0", "--objective.nll_weight", "objective.nll_weight"),
    ("--rpo_alpha 1", "--objective.nll_weight", "objective.nll_weight"),
    ("--simpo_gamma 0.5", "--objective.gamma", "objective.gamma"),
    ("--desirable_weight 1", "--objective.desirable_weight", "objective.desirable_weight"),
    ("--reference_free", "--objective simpo", "objective: simpo"),
    ("--eval_strategy steps", "--eval_steps", "eval_steps"),
    ("--evaluation-strategy=steps", "--eval_steps", None),
    ("--save_strategy no", "--save_steps 0", "save_steps: 0"),
    ("--save_strategy epoch", "--save_steps", "save_steps"),
    ("--warmup_steps 150", "--warmup_ratio", "warmup_ratio"),
    ("--logging_first_step", "--logging_steps", "logging_steps"),
    ("--max_completion_length 256", "--max_length", "max_length"),
    ("--resume_from_checkpoint x", "--resume", "resume"),
    ("--per_device_eval_batch_size 4", "--max_tokens_per_batch", "max_tokens_per_batch"),
    ("--cutoff_len 2048", "--max_length", "max_length"),
    ("--lora_rank 8", "--lora.r", "lora.r"),
    ("--lora.rank 8", "--lora.r", None),
    ("--pref_loss simpo", "--objective simpo", "objective: simpo"),
    ("--pref_beta 0.1", "--objective.beta", "objective.beta"),
    ("--finetuning_type lora", "--lora true", "lora: true"),
]
NEEDED_FLAGS = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip()


@pytest.mark.parametrize(("written", "ours"), [(written, ours) for written, ours, _ in PASTED])
def test_a_pasted_flag_gets_its_name_here(written: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = re.split(r"[ =]", written)[0].replace("-", "_").replace("__", "--", 1)
    message = said(["train", *NEEDED_FLAGS, *written.split()], capsys)
    assert message.startswith(f"error: unknown flag '{flag}'; did you mean '{ours}'?")
    assert "\n" not in message


@pytest.mark.parametrize(("written", "ours"), [(written, ours) for written, _, ours in PASTED if ours])
def test_a_pasted_key_gets_its_name_and_its_line(
    written: str, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, *values = re.split(r"[ =]", written.removeprefix("--"))
    value = "true" if not values else values[0] if len(values) == 1 else f"[{', '.join(values)}]"
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: 1\n{key}: {value}\n")
    message = said(["train", *NEEDED_FLAGS, "--config", str(file)], capsys)
    assert message.startswith(f"error: {file}:2: unknown key '{key}'; did you mean '{ours}'?")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train --load_in_8bit",
            "unknown flag '--load_in_8bit'; there is no such setting here (weights are held in 4 bits",
        ),
        ("train --deepspeed ds.json", "unknown flag '--deepspeed'; there is no such setting here (DeepSpeed is refused;"),
        ("train --loss_type hinge", "unknown flag '--loss_type'; there is no such setting here (the hinge loss"),
        ("train --precompute_ref_log_probs", "unknown flag '--precompute_ref_log_probs'; leave it out ("),
        ("train --no_remove_unused_columns", "unknown flag '--no_remove_unused_columns'; leave it out ("),
        (
            "train --logging_dir x",
            "unknown flag '--logging_dir'; leave it out (TensorBoard's files are in 'output_dir'/tensorboard)",
        ),
        ("train --num_generations 4", "unknown flag '--num_generations'; 'ncalign online' takes it as '--num_samples'"),
        ("generate --num_generations 4", "unknown flag '--num_generations'; did you mean '--num_samples'?"),
        ("generate --dataset_name x", "unknown flag '--dataset_name'; did you mean '--prompts'?"),
        ("generate --max_completion_length 8", "unknown flag '--max_completion_length'; did you mean '--max_new_tokens'?"),
        ("generate --learning_rate 1", "unknown flag '--learning_rate'; 'ncalign train' takes it as '--learning_rate'"),
        ("score --max_tokens 8", "unknown flag '--max_tokens'; did you mean '--judge.max_tokens'?"),
        ("online --use_vllm", "unknown flag '--use_vllm'; did you mean '--generator vllm'?"),
        ("train --objective sigmoid", "--objective: found 'sigmoid'; did you mean 'objective: dpo'?"),
        ("train --objective orpo", "--objective: found 'orpo'; there is no such setting here (ORPO is not implemented;"),
        ("train --objective.simpo_gamma 1", "unknown flag '--objective.simpo_gamma'; did you mean '--objective.gamma'?"),
        ("train --server.model_name x", "unknown flag '--server.model_name'; --help lists the flags"),
        ("dpo --model m", "unknown verb 'dpo'; did you mean 'train --objective dpo'?"),
    ],
)
def test_what_is_elsewhere_or_not_here_is_said(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(arguments.split(), capsys)


def test_a_section_gets_the_answers_that_belong_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora:\n  rank: 8\n  lora_alpha: 3\n  bf16: true\nobjective:\n  name: dpo\n  alpha: 1\n")
    lines = said(["train", *NEEDED_FLAGS, "--config", str(file)], capsys).splitlines()[1:]
    assert [line.split(":", 1)[1] for line in lines] == [
        "2: unknown key 'lora.rank'; did you mean 'lora.r'?",
        "3: unknown key 'lora.lora_alpha'; did you mean 'lora.alpha'?",
        "4: unknown key 'lora.bf16'; it has r, alpha, dropout, target_modules, target_parameters",
        "7: unknown key 'objective.alpha' (a field of info_nca, exo, swepo, nca); 'dpo' has beta, estimator, pairing, "
        "label_smoothing",
    ]


def test_verbs_of_theirs_lead_to_verbs_of_ours() -> None:
    for theirs, ours in verbs().items():
        verb, *rest = ours.split()
        assert theirs not in FIELDS
        assert verb in FIELDS
        if rest:
            settings.load(MODELS[verb], None, {**NEEDED, rest[0].removeprefix("--"): rest[1]})


# --- The page --------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "extensions"), *sys.path])
    monkeypatch.delitem(sys.modules, "other_names", raising=False)
    made = importlib.import_module("other_names").with_tables(PAGE)
    assert made == PAGE, "run: python docs/extensions/other_names.py"
    assert all(f"<!-- names: {title} -->" in PAGE for title in tables())


def test_the_message_on_the_page_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```console\n\$ ncalign (.*)\n((?:.*\n)*?)```", PAGE)
    assert block is not None
    assert said(shlex.split(block[1]), capsys) == block[2].strip()


def test_the_defaults_on_the_page_are_those_of_both() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| `([\w.]+)` \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 8
    theirs = {
        **fields_of("trl.experimental.cpo", "CPOConfig"),
        **fields_of("trl", "ModelConfig"),
        **fields_of("trl", "DPOConfig"),
    }
    extra = {"objective.gamma": "simpo", "lora.dropout": ""}
    for name, default, ours, here in rows:
        field = theirs[name]
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert plain(value) == plain(default), name
        flags = {"objective": "simpo"} if extra.get(ours) == "simpo" else {}
        if ours.startswith(("lora", "quantization")):
            flags = {"lora": "true", "quantization": "true"}
        config: Any = settings.load(MODELS["train"], None, {**NEEDED, **flags})
        for part in ours.split("."):
            config = getattr(config, part)
        assert plain(getattr(config, "name", config)) == plain(here), ours


def plain(value: object) -> str | float:
    """A default as a number where it is one, or else as a word."""
    if isinstance(value, list | tuple):
        (value,) = value
    word = str(getattr(value, "value", value)).strip("`").lower()
    try:
        return float(word)
    except ValueError:
        return word

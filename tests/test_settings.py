"""YAML and flags → configuration: what is accepted, and what each mistake is told to its writer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ncalign.cli.settings import field_names, load, nearest, to_yaml
from ncalign.core.config import fields
from ncalign.core.errors import ConfigError
from ncalign.data.config import ConvertConfig
from ncalign.demo.config import DemoConfig
from ncalign.model.config import EncodingConfig, LoRA
from ncalign.objectives import BCO, DPO, MCPO, NCA, NLL, InfoNCA, Mix, ObjectiveConfig
from ncalign.online.config import OnlineConfig
from ncalign.rewards.config import JudgeConfig
from ncalign.training.config import TrainConfig

NEEDED = {"model": "m", "data": "d.jsonl", "output_dir": "runs/x"}


@pytest.fixture
def write(tmp_path: Path):
    """Write a YAML file for `train` whose first three lines are the required fields."""

    def _write(text: str, *, needed: bool = True) -> Path:
        path = tmp_path / "run.yaml"
        head = "model: m\ndata: d.jsonl\noutput_dir: runs/x\n" if needed else ""
        path.write_text(head + text, encoding="utf-8")
        return path

    return _write


def problems(file: Path | None, flags: dict[str, str] | None = None, *, needed: bool = False) -> tuple[str, ...]:
    """Return the problems of a training configuration, each without the folder of the file."""
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, file, (NEEDED if needed else {}) | (flags or {}))
    folder = f"{file.parent}/" if file else ""
    return tuple(problem.replace(folder, "") if folder else problem for problem in caught.value.problems)


def test_flags_override_the_file_and_the_file_overrides_defaults(write) -> None:
    config = load(TrainConfig, write("seed: 3\nmax_steps: 7\n"), {"seed": "5"})
    assert (config.seed, config.max_steps, config.logging_steps) == (5, 7, 1)
    assert config.data == Path("d.jsonl")


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1.0e-5", ".00001", "'1e-5'"])
def test_a_number_is_a_number_in_every_spelling(write, text: str) -> None:
    assert load(TrainConfig, write(f"learning_rate: {text}\n"), {}).learning_rate == 1e-5
    assert load(TrainConfig, None, NEEDED | {"learning_rate": text.strip("'")}).learning_rate == 1e-5


def test_text_that_yaml_takes_for_something_else_stays_text(write) -> None:
    config = load(TrainConfig, write("model: 0123\noutput_dir: 2024-01-01\n", needed=False), {"data": "yes"})
    assert (config.model, config.output_dir, config.data) == ("0123", Path("2024-01-01"), Path("yes"))


def test_a_boolean_is_not_taken_for_a_number(write) -> None:
    (problem,) = problems(write("learning_rate: yes\n"))
    assert problem == "run.yaml:4: learning_rate: found 'yes'; must be a valid number"


@pytest.mark.parametrize("text", ["true", "True", "yes", "on"])
def test_booleans(write, text: str) -> None:
    assert load(TrainConfig, write(f"resume: {text}\n"), {}).resume is True
    assert load(TrainConfig, write(f"resume: {text}\n"), {"resume": "false"}).resume is False


@pytest.mark.parametrize("text", ["null", "none", "None", "~", ""])
def test_null_switches_an_optional_field_off(write, text: str) -> None:
    file = write(f"eval_data: {text}\n")
    assert load(TrainConfig, file, {}).eval_data is None
    assert load(TrainConfig, write("eval_data: e.jsonl\n"), {"eval_data": text}).eval_data is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tensorboard", ("tensorboard",)),
        ("tensorboard,wandb", ("tensorboard", "wandb")),
        ("[tensorboard, wandb]", ("tensorboard", "wandb")),
        ("[]", ()),
        ("none", ()),
    ],
)
def test_lists(write, text: str, expected: tuple[str, ...]) -> None:
    assert load(TrainConfig, write(f"report_to: {text}\n"), {}).report_to == expected
    assert load(TrainConfig, None, NEEDED | {"report_to": text}).report_to == expected


@pytest.mark.parametrize(("text", "expected"), [("q_proj", "q_proj"), ("q_proj,v_proj", ("q_proj", "v_proj"))])
def test_text_or_list(text: str, expected: str | tuple[str, ...]) -> None:
    config = load(TrainConfig, None, NEEDED | {"lora.target_modules": text})
    assert config.lora == LoRA(target_modules=expected)


def test_a_lora_flag_creates_the_section() -> None:
    assert load(TrainConfig, None, NEEDED).lora is None
    assert load(TrainConfig, None, NEEDED | {"lora.r": "8"}).lora == LoRA(r=8)


def test_the_lora_switch(write) -> None:
    file = write("lora:\n  r: 4\n")
    assert load(TrainConfig, file, {}).lora == LoRA(r=4)
    assert load(TrainConfig, file, {"lora": "true", "lora.alpha": "2"}).lora == LoRA(r=4, alpha=2.0)
    assert load(TrainConfig, file, {"lora": "false"}).lora is None
    assert load(TrainConfig, file, {"lora": "null"}).lora is None
    assert load(TrainConfig, None, NEEDED | {"lora": "true"}).lora == LoRA()
    assert load(TrainConfig, write("lora: true\n"), {}).lora == LoRA()
    assert load(TrainConfig, write("lora: null\n"), {"lora.r": "2"}).lora == LoRA(r=2)


def test_lora_switched_off_and_set_at_once_is_refused() -> None:
    (problem,) = problems(None, {"lora": "false", "lora.r": "8"}, needed=True)
    assert problem == "--lora.r: can't be used with --lora false, which switches it off"


def test_objective_by_name_alone(write) -> None:
    assert load(TrainConfig, write("objective: dpo\n"), {}).objective == DPO()


def test_objective_without_a_name_is_the_default_method(write) -> None:
    assert load(TrainConfig, write("objective:\n  beta: 0.3\n"), {}).objective == MCPO(beta=0.3)
    assert load(TrainConfig, None, NEEDED | {"objective.num_negatives": "2"}).objective == MCPO(num_negatives=2)


def test_another_method_by_flag_drops_the_fields_of_the_file(write) -> None:
    file = write("objective:\n  name: info_nca\n  beta: 0.3\n  alpha: 5\n")
    assert load(TrainConfig, file, {"objective.beta": "0.2"}).objective == InfoNCA(beta=0.2, alpha=5.0)
    # nca has beta and alpha too; a value chosen for info_nca still says nothing about it.
    assert load(TrainConfig, file, {"objective": "nca"}).objective == NCA()
    assert load(TrainConfig, file, {"objective": "nca", "objective.alpha": "2"}).objective == NCA(alpha=2.0)
    # Naming the file's own method again is no switch.
    assert load(TrainConfig, file, {"objective": "info_nca"}).objective == InfoNCA(beta=0.3, alpha=5.0)


MIX = "objective:\n  name: mix\n  parts:\n    - dpo\n    - name: bco\n      beta: 2e-1\n      threshold: none\n    - nll\n"


def test_a_section_within_a_section(write) -> None:
    written = write("objective:\n  name: nca\n  estimator: {candidates: 3}\n")
    assert load(TrainConfig, written, {}).objective == NCA(estimator={"candidates": 3})
    flags = {"objective.estimator.candidates": "2", "objective.beta": "0.2"}
    assert load(TrainConfig, written, flags).objective == NCA(beta=0.2, estimator={"candidates": 2})
    assert load(TrainConfig, None, NEEDED | {"objective": "nca"} | flags).objective.estimator.candidates == 2
    on = NEEDED | {"objective": "nca", "objective.estimator": "true"}
    assert load(TrainConfig, None, on).objective.estimator.candidates == "auto"
    assert load(TrainConfig, None, on | {"objective.estimator.candidates": "4"}).objective.estimator.candidates == 4
    assert load(TrainConfig, written, {"objective.estimator": "false"}).objective == NCA()
    assert load(TrainConfig, write("objective: {name: nca, estimator: true}\n"), {}).objective == NCA(estimator={})


def test_mistakes_in_a_section_within_a_section_are_placed(write) -> None:
    (problem,) = problems(write("objective:\n  name: nca\n  estimator:\n    candidates: 0\n"))
    assert problem.startswith("run.yaml:7: objective.estimator.candidates: found '0'; must be greater than or equal to 1")
    (problem,) = problems(None, {"objective": "nca", "objective.estimator.candidate": "2"}, needed=True)
    assert problem == "unknown flag '--objective.estimator.candidate'; did you mean '--objective.estimator.candidates'?"
    (problem,) = problems(write("objective:\n  name: dpo\n  estimator: true\n"))
    assert problem.startswith("run.yaml:4: objective: dpo: an estimator replaces the gradients of a whole group's candidates")
    (problem,) = problems(None, {"objective": "mc_po", "objective.estimator.candidates": "2"}, needed=True)
    assert problem.startswith("unknown flag '--objective.estimator' (a field of ")
    off = {"objective": "nca", "objective.estimator": "false", "objective.estimator.candidates": "2"}
    (problem,) = problems(None, off, needed=True)
    assert "switches it off" in problem


def test_a_list_of_sections_has_names_sections_and_flags(write) -> None:
    mix = Mix(parts=(DPO(), BCO(beta=0.2), NLL()), weights=(0.8, 0.2, 1.0))
    config = load(TrainConfig, write(MIX + "  weights: [0.8, 0.2, 1]\n"), {})
    assert config.objective == mix
    again = write(to_yaml(config), needed=False)
    assert load(TrainConfig, again, {}) == config
    by_flags = {"objective": "mix", "objective.parts": "dpo,nca", "objective.weights": "1,2"}
    assert load(TrainConfig, None, NEEDED | by_flags).objective == Mix(parts=(DPO(), NCA()), weights=(1.0, 2.0))
    assert load(TrainConfig, write(MIX), {"objective.weights": "0.8,0.2,1"}).objective == mix


def test_mistakes_in_a_list_of_sections_are_placed(write) -> None:
    assert problems(write(MIX.replace("- dpo", "- dpoo").replace("beta", "bta"))) == (
        "run.yaml:6: objective.parts.0: found 'dpoo'; did you mean 'dpo'?",
        "run.yaml:9: unknown key 'objective.parts.1.bta'; did you mean 'objective.parts.1.beta'?",
    )
    assert problems(write(MIX.replace("2e-1", "-1").replace("none", "high") + "  weights: [1, 0, 1]\n")) == (
        "run.yaml:9: objective.parts.1.beta: found '-1'; must be greater than 0",
        "run.yaml:10: objective.parts.1.threshold: found 'high'; must be a valid number",
        "run.yaml:12: objective.weights: found '0'; must be greater than 0",
    )
    assert problems(write(MIX + "  weights: [1]\n")) == (
        "run.yaml:4: objective: 1 weights for 3 parts: give one for each, in their order",
    )
    assert problems(None, {"objective": "mix"}, needed=True) == (
        "missing: objective.parts; give --objective.parts ..., or the same keys in the --config file",
    )


def test_unknown_key_has_file_line_and_nearest_name(write) -> None:
    (problem,) = problems(write("seed: 1\nlearning_rat: 1e-5\n"))
    assert problem == "run.yaml:5: unknown key 'learning_rat'; did you mean 'learning_rate'?"


def test_unknown_nested_key(write) -> None:
    (problem,) = problems(write("objective:\n  name: nca\n  bta: 0.1\n"))
    assert problem == "run.yaml:6: unknown key 'objective.bta'; did you mean 'objective.beta'?"


def test_unknown_nested_key_without_a_near_name_lists_the_methods_fields(write) -> None:
    (problem,) = problems(write("objective:\n  name: nca\n  zzz: 0.1\n"))
    assert (
        problem
        == "run.yaml:6: unknown key 'objective.zzz'; 'nca' has beta, estimator, alpha, target_entropy, transform, normalizer"
    )


def test_a_field_of_another_method_names_its_owners(write) -> None:
    known = "(a field of info_nca, exo, swepo, nca); 'dpo' has beta, estimator, pairing, label_smoothing"
    (problem,) = problems(write("objective:\n  name: dpo\n  alpha: 1\n"))
    assert problem == f"run.yaml:6: unknown key 'objective.alpha' {known}"
    (problem,) = problems(None, {"objective": "dpo", "objective.alpha": "1"}, needed=True)
    assert problem == f"unknown flag '--objective.alpha' {known}"


def test_a_nested_field_at_the_top_level(write) -> None:
    (problem,) = problems(write("beta: 0.1\n"))
    assert problem == "run.yaml:4: unknown key 'beta'; did you mean 'objective.beta'?"


def test_unknown_method(write) -> None:
    (problem,) = problems(write("objective: ncca\n"))
    assert problem == "run.yaml:4: objective: found 'ncca'; did you mean 'nca'?"
    (problem,) = problems(None, {"objective": "zzz"}, needed=True)
    names = [config.model_fields["name"].default for config in get_args(get_args(ObjectiveConfig)[0])]
    assert problem == f"--objective: found 'zzz'; must be one of {', '.join(names)}"


def test_wrong_type_and_range(write) -> None:
    assert problems(write("seed: three\n")) == ("run.yaml:4: seed: found 'three'; must be a valid integer",)
    assert problems(write("seed: -1\n")) == ("run.yaml:4: seed: found '-1'; must be greater than or equal to 0",)
    assert problems(write("learning_rate: nan\n")) == ("run.yaml:4: learning_rate: found 'nan'; must be a finite number",)
    assert problems(write("resume: maybe\n")) == ("run.yaml:4: resume: found 'maybe'; must be true or false",)
    assert problems(write("seed:\n")) == ("run.yaml:4: seed: found null; must be a valid integer",)
    assert problems(write("seed: [1]\n")) == ("run.yaml:4: seed: found a list; must be a valid integer",)
    assert problems(None, {"lora.r": "0"}, needed=True) == ("--lora.r: found '0'; must be greater than or equal to 1",)
    (problem,) = problems(write("dtype: bfloat61\n"))
    assert problem == (
        "run.yaml:4: dtype: found 'bfloat61'; must be 'auto', 'float32', 'bfloat16' or 'float64'; did you mean 'bfloat16'?"
    )
    (problem,) = problems(write("lora: 16\n"))
    assert problem == "run.yaml:4: lora: found '16'; must be true, false or a section with fields of its own"


def test_fields_that_contradict_each_other_are_both_placed(write) -> None:
    (problem,) = problems(write("max_length: 100\n"), {"max_prompt_length": "100"})
    places, _, rest = problem.partition(": max_prompt_length (100)")
    assert set(places.split(", ")) == {"run.yaml:4", "--max_prompt_length"}
    assert rest == " must be less than max_length (100): completions need room"


def test_every_problem_is_listed_once(write) -> None:
    file = write("sed: 1\nmax_steps: x\nobjective:\n  name: nca\n  alpha: -1\nlora:\n  r: 1\n  r: 2\n")
    assert problems(file, {"learning_rate": "0"}) == (
        "run.yaml:11: duplicate key 'lora.r' (first on line 10); keep one",
        "run.yaml:4: unknown key 'sed'; did you mean 'seed'?",
        "run.yaml:8: objective.alpha: found '-1'; must be greater than 0",
        "--learning_rate: found '0'; must be greater than 0",
        "run.yaml:5: max_steps: found 'x'; must be a valid integer",
    )


def test_missing_fields_are_one_message() -> None:
    (problem,) = problems(None, {"model": "m"})
    assert problem == "missing: data, output_dir; give --data ... --output_dir ..., or the same keys in the --config file"


def test_a_misspelt_required_field_is_not_missing_too(write) -> None:
    (problem,) = problems(write("modle: m\ndata: d\noutput_dir: o\n", needed=False))
    assert problem == "run.yaml:1: unknown key 'modle'; did you mean 'model'?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: [1\nmodel: m\n", "run.yaml:2:6: not well-formed YAML: "),
        ("- a\n", "run.yaml:1: must be 'field: value' lines at the top level"),
        ("seed: 1\nseed: 2\n", "run.yaml:2: duplicate key 'seed' (first on line 1); keep one"),
        ("lora: &a\n  r: *a\n", "run.yaml:1: an alias contains itself"),
        ("model: !!python/name:os.system\n", "run.yaml:1: the tag 'tag:yaml.org,2002:python/name:os.system' is not allowed"),
        ("model: !mine x\n", "run.yaml:1: the tag '!mine' is not allowed"),
        ("? [a]\n: 1\n", "run.yaml:1: a key must be a plain name"),
    ],
)
def test_malformed_yaml(write, text: str, expected: str) -> None:
    assert problems(write(text, needed=False), NEEDED)[0].startswith(expected)


def aliases(levels: int, inside: str = "[{}]") -> str:
    """Each level holds the one before nine times over."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} " + inside.format(", ".join([f"*a{n - 1}"] * 9)) for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (aliases(6), "it holds 141,176 values once its aliases are written out; 100,000 are the most that are read"),
        (aliases(40), "it holds more than 10^12 values once its aliases are written out"),
        (aliases(40, "{{<<: [{}]}}"), "it holds more than 10^12 values"),
        (
            "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200)),
            "it is nested more than 50 levels deep",
        ),
        ("seed: " + "[" * 5000, "it is nested more than 50 levels deep"),
        ("seed: " + "[" * 60 + "]" * 60, "it is nested more than 50 levels deep"),
        ("# " + "x" * 2**18, "it is larger than 256 KiB"),
    ],
    ids=["aliases", "more aliases", "merged aliases", "deep aliases", "open brackets", "brackets", "a large file"],
)
def test_yaml_beyond_all_bounds(write, text: str, expected: str) -> None:
    (problem,) = problems(write(text), NEEDED)
    assert problem.startswith(f"config file run.yaml: {expected}")


def test_a_device_is_no_endless_file() -> None:
    (problem,) = problems(Path("/dev/zero"))
    assert problem.startswith("config file zero: it is larger than 256 KiB")


def test_aliases_are_followed(write) -> None:
    config = load(TrainConfig, write("eval_data: &there e.jsonl\ncache_dir: *there\n"), {})
    assert config.cache_dir == config.eval_data == Path("e.jsonl")


def test_an_empty_file_is_no_values(write) -> None:
    assert load(TrainConfig, write("# nothing yet\n", needed=False), NEEDED) == load(TrainConfig, None, NEEDED)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "none.yaml")
    assert problem == "config file none.yaml: No such file or directory; check --config"
    (problem,) = problems(tmp_path)
    assert problem.endswith("Is a directory; check --config")
    (tmp_path / "latin.yaml").write_bytes("model: café\n".encode("latin-1"))
    (problem,) = problems(tmp_path / "latin.yaml")
    assert problem == "config file latin.yaml: not UTF-8 text (byte 10); save it as UTF-8"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learning_rate": "1e-7", "report_to": "[]", "lora": "true"},
        {"objective": "nca", "objective.alpha": "1e-4", "lora.target_modules": "q_proj,v_proj", "eval_data": "e x.jsonl"},
        {"model": "null", "output_dir": "on", "report_to": "wandb"},
    ],
)
def test_printed_configuration_reads_back_equal(tmp_path: Path, flags: dict[str, str]) -> None:
    config = load(TrainConfig, None, NEEDED | flags)
    (tmp_path / "printed.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(TrainConfig, tmp_path / "printed.yaml", {}) == config


def test_printed_configuration_has_every_field() -> None:
    printed = yaml.safe_load(to_yaml(load(DemoConfig, None, {})))
    assert set(printed) == set(DemoConfig.model_fields)


def test_a_held_configuration_is_written_flat(write) -> None:
    flat = TrainConfig.model_validate(NEEDED | {"max_length": 64, "learning_rate": 1e-4})
    held = TrainConfig(
        encoding=EncodingConfig(max_length=64), model="m", data="d.jsonl", output_dir="runs/x", learning_rate=1e-4
    )
    assert flat == held == load(TrainConfig, write("max_length: 64\n"), {"learning_rate": "1e-4"})
    assert flat.encoding.max_length == flat.model_dump()["max_length"] == 64
    assert "encoding" not in flat.model_dump()
    assert list(flat.model_dump()) == list(fields(TrainConfig))
    (problem,) = problems(write("encoding:\n  max_length: 64\n"))
    assert problem.startswith("run.yaml:4: unknown key 'encoding'")


def test_an_online_run_holds_a_training_and_replaces_what_means_another_thing(write) -> None:
    config = load(OnlineConfig, write("reward: r.py:f\nlearning_rate: 1e-4\nreference: ema\nmax_length: 300\n"), {})
    assert (config.training.learning_rate, config.training.encoding.max_length) == (1e-4, 300)
    assert (config.reference, config.training.reference) == ("ema", "compute")
    assert config.training.resume
    assert not load(OnlineConfig, write("reward: r.py:f\n"), {"resume": "false"}).training.resume
    assert not load(TrainConfig, write(""), {}).resume
    printed = config.model_dump()
    assert list(printed)[: len(fields(TrainConfig))] == list(fields(TrainConfig))
    assert (printed["reference"], printed["resume"]) == ("ema", True)
    assert OnlineConfig.model_validate(printed) == config
    assert fields(OnlineConfig)["data"].description != fields(TrainConfig)["data"].description
    assert fields(OnlineConfig)["reference"].default == "fixed"


def test_a_mistake_in_a_held_configuration_is_placed_where_it_was_written(write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(OnlineConfig, write("max_length: 1\njudge:\n  max_retries: -1\n  sever: x\n"), {"learning_rate": "0"})
    assert [problem.rpartition("/")[2] for problem in caught.value.problems] == [
        "run.yaml:7: unknown key 'judge.sever'; it has base_url, base_urls, model, api_key_env, max_concurrency, "
        "requests_per_minute, "
        "timeout_seconds, max_retries, logprobs, mode, template, lowest, highest, opponents, max_tokens, attempts",
        "run.yaml:4: max_length: found '1'; must be greater than or equal to 2",
        "--learning_rate: found '0'; must be greater than 0",
        "run.yaml:6: judge.max_retries: found '-1'; must be greater than or equal to 0",
        "missing: reward; give --reward ..., or the same keys in the --config file",
    ]


def test_a_judge_is_a_server_and_how_it_judges() -> None:
    judge = JudgeConfig.model_validate({"base_url": "http://h/v1", "model": "j", "attempts": 2})
    assert (judge.server.base_url, judge.server.model, judge.attempts) == ("http://h/v1", "j", 2)
    assert judge.model_dump()["base_url"] == "http://h/v1"


@given(st.floats(min_value=1e-300, max_value=1e300), st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_number_and_text_round_trip(tmp_path_factory: pytest.TempPathFactory, number: float, text: str) -> None:
    config = TrainConfig(model=text, data=Path("d"), output_dir=Path("o"), learning_rate=number)
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_bytes(to_yaml(config).encode("utf-8"))
    assert load(TrainConfig, path, {}) == config


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8"))
    with pytest.raises(ConfigError) as caught:  # the required fields are never all there
        load(ConvertConfig, path, {})
    assert all(re.match(r"\S", problem) for problem in caught.value.problems)


def test_names_of_fields_and_the_nearest() -> None:
    names = field_names(TrainConfig)
    assert {"seed", "objective", "objective.alpha", "objective.pairing", "lora.r"} <= set(names)
    assert len(names) == len(set(names))
    assert "objective.name" not in names
    assert nearest("temprature", ["temperature", "seed"]) == "temperature"
    assert nearest("alpha", ["seed", "lora.alpha"]) == "lora.alpha"
    assert nearest("zzz", names) is None

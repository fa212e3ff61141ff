"""Reasoning tasks: answers, data files, the papers' table, and whole runs of lm-eval on a tiny model."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ncalign.cli.app import main
from ncalign.generation.base import SamplingParams
from ncalign.model.policy import model_identity
from ncalign.report.tables import Column, Table, model_name, to_csv, to_latex
from ncalign.tasks import reasoning
from ncalign.tasks.lm_backend import Backend, BackendGenerator, backend_arguments, load_backend
from ncalign.tasks.reasoning import TaskProtocol, run_tasks, score_key
from ncalign.tasks.reasoning_table import COLUMNS, paper_table
from ncalign.tasks.sandbox import run as sandbox
from ncalign.tasks.task_data import READERS, TASK_FOLDER, prepare

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


# -- final answers ------------------------------------------------------------------------------------------------------


@needs_math
@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("5 + 7 = 12. The answer is 12.", "12", True),
        ("5 + 7 = 12. The answer is 12 apples, of 3 kinds.", "12.0", True),
        ("The answer is 11. No: the answer is 12", "12", True),
        ("There are 12", "12", True),
        ("There are 12 of 20", "12", False),
        ("#### 1,200", "1200", True),
        ("The answer is $1,200.50.", "1200.5", True),
        ("The answer is -3", "3", False),
        ("The answer is \u22123", "-3", True),
        ("So \\boxed{\\frac{3}{4}}", "0.75", True),
        ("The answer is 3/4.", "0.75", True),
        ("The answer is $\\sqrt{16}$", "4", True),
        ("The answer is 0.3334", "0.333333", True),
        ("The answer is 0.34", "0.333333", False),
        ("The answer is 1000001", "1000000", False),
        ("I don't know", "12", False),
        ("", "12", False),
        ("The answer is", "12", False),
        ("The answer is 12", "None", False),
        ("The answer is none", "None", True),
        ("It cannot be determined.", "None", True),
        ("The answer is Monday.", "monday", True),
        ("The answer is Tuesday.", "monday", False),
    ],
)
def test_a_number_is_found_and_compared(text: str, gold: str, right: bool) -> None:
    from ncalign.tasks.final_answers import process_number

    assert process_number({"answer": gold}, [text]) == {"exact_match": float(right)}


@needs_math
@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The answer is True", True, True),
        ("The answer is yes.", True, True),
        ("The answer is False", True, False),
        ("The answer is no", False, True),
        ("The answer is 1", True, False),
        ("The answer is 8", 8, True),
        ("The answer is 8.4", 8, True),  # 8 when rounded
        ("The answer is 8.6", 8, False),
        ("The answer is 3.5", 3.464, True),  # within 4 %
        ("The answer is 3.7", 3.464, False),
        ("The answer is 0.001", 0.0, False),
        ("The answer is $\\frac{\\pi}{2}$", 1.5708, True),
        ("The answer is [2, -1].", [-1, 2], True),
        ("The answer is (2, -1, 0).", [-1, 2], False),
        ("The answer is [0.5, 0.259]", [0.25, 0.5], True),
        ("The answer is (b)", "(b)", True),
        ("The answer is b.", "(b)", True),
        ("The answer is (a)", "(b)", False),
        ("no idea", 3.464, False),
        ("no idea", [1, 2], False),
    ],
)
def test_a_theorems_answer_is_compared_by_its_type(text: str, gold: Any, right: bool) -> None:
    from ncalign.tasks.final_answers import process_theorem

    assert process_theorem({"answer": json.dumps(gold)}, [text]) == {"exact_match": float(right)}


@needs_math
def test_verdicts_on_real_solutions_are_their_authors() -> None:
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k-model-solutions" / "example_model_solutions.jsonl"
    if not path.is_file():
        pytest.skip("the shared data are not here")
    from ncalign.tasks.final_answers import process_number

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ours, theirs = [], []
    for row in rows:
        gold = row.pop("ground_truth").rpartition("A: ")[2].strip()
        for solution in (value for value in row.values() if isinstance(value, dict)):
            text = re.sub(r"<<.*?>>", "", solution["solution"])  # the calculator's notes
            ours.append(process_number({"answer": gold}, [text])["exact_match"] == 1.0)
            theirs.append(solution["is_correct"])
    assert len(ours) == 4 * len(rows)
    assert ours == theirs


# -- data files ---------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "svamp": (
        {"ID": "chal-1", "Body": "There are 8 birds", "Question": "How many?", "Answer": 8.0, "Equation": "8", "Type": "x"},
        ("There are 8 birds. How many?", "8.0"),
    ),
    "gsm_plus": (
        {"question": "Two and two?", "solution": "2 + 2 = 4\n#### 4", "answer": "4", "perturbation_type": "x"},
        ("Two and two?", "4"),
    ),
    "asdiv_cot": (
        {"body": "Ann has 9 apples.", "question": "How many?", "answer": "9 (apples)", "formula": "9"},
        ("Ann has 9 apples. How many?", "9"),
    ),
    "theoremqa": ({"Question": "Is 2 prime?", "Answer": True, "Answer_type": "bool", "Picture": None}, ("Is 2 prime?", "true")),
}


@pytest.mark.parametrize("task", READERS)
@pytest.mark.parametrize("form", ["array", "object", "lines", "gzipped"])
def test_a_sets_own_file_is_read(tmp_path: Path, task: str, form: str) -> None:
    row, (question, answer) = ROWS[task]
    text = {
        "array": json.dumps([row, row], indent=1),
        "object": json.dumps({"data": [row, row]}),
        "lines": f"{json.dumps(row)}\n\n{json.dumps(row)}\n",
        "gzipped": json.dumps([row, row]),
    }[form]
    source = tmp_path / "set.json"
    source.write_bytes(gzip.compress(text.encode()) if form == "gzipped" else text.encode())
    prepare(task, source, tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(each["question"], each["answer"]) for each in written] == [(question, answer)] * 2
    assert all(isinstance(value, str) for each in written for value in each.values())


@pytest.mark.parametrize(
    ("kind", "answer", "stored"),
    [
        ("bool", "True", "true"),
        ("integer", "8", "8"),
        ("integer", 8.0, "8"),
        ("float", "3.5", "3.5"),
        ("float", 3, "3.0"),
        ("list of integer", "[1, 2]", "[1, 2]"),
        ("list of float", [1, 2.5], "[1.0, 2.5]"),
        ("option", "(b)", '"(b)"'),
    ],
)
def test_theoremqa_answers_keep_their_type(write_jsonl: Callable[..., Path], kind: str, answer: Any, stored: str) -> None:
    source = write_jsonl([{"Question": "q", "Answer": answer, "Answer_type": kind}], "t.jsonl")
    prepare("theoremqa", source, source.with_name("out.jsonl"))
    assert json.loads(source.with_name("out.jsonl").read_text())["answer"] == stored


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ("svamp", [ROWS["svamp"][0], {"Body": "x"}], "t.jsonl:2: `Question` is null"),
        ("svamp", ["{"], "t.jsonl:1: this line is not JSON"),
        ("svamp", ["3"], "an array of questions is needed"),
        ("svamp", [[3]], "question 1: 3 (a number) is no question of svamp"),
        ("svamp", [], "has no question"),
        ("gsm_plus", [{"question": "q", "answer": True}], "`answer` is true"),
        ("theoremqa", [{"Question": "q", "Answer": "8", "Answer_type": "word"}], "`Answer_type` 'word'"),
        ("theoremqa", [{"Question": "q", "Answer": "eight", "Answer_type": "integer"}], "`Answer` is 'eight'"),
        ("theoremqa", [{"Question": "q", "Answer": 1.5, "Answer_type": "integer"}], "`Answer` is 1.5"),
    ],
)
def test_a_file_of_another_set_is_refused(write_jsonl: Callable[..., Path], task: str, rows: list[Any], said: str) -> None:
    source = write_jsonl(rows, "t.jsonl")
    with pytest.raises(ValueError, match=r"t\.jsonl") as raised:
        prepare(task, source, source.with_name("out.jsonl"))
    assert said in str(raised.value)
    assert not source.with_name("out.jsonl").exists()


def test_every_set_has_a_task_file_that_ships() -> None:
    assert {path.stem for path in TASK_FOLDER.glob("*.yaml")} == set(READERS)


@needs_math
@pytest.mark.parametrize("task", READERS)
def test_the_examples_of_a_task_are_right_by_its_own_measure(task: str) -> None:
    from ncalign.tasks.final_answers import final_text

    text = (TASK_FOLDER / f"{task}.yaml").read_text().replace("!function ", "")
    settings = yaml.safe_load(text)
    samples = settings["fewshot_config"]["samples"]
    assert settings["num_fewshot"] == len(samples)
    for sample in samples:
        assert final_text(sample["reasoning"]) == sample["reasoning"].rpartition("The answer is ")[2]


# -- the papers' table --------------------------------------------------------------------------------------------------

PAPER = {  # the table of the NCA paper: scores, their average
    "Mixtral-7B-SFT": ([60.9, 3.3, 28.1, 28.5, 5.8, 7.0, 26.9, 35.8], 24.5),
    "+ DPO": ([61.7, 2.2, 31.7, 12.1, 6.4, 9.8, 34.1, 46.1], 25.5),
    "+ NCA": ([60.8, 3.3, 26.8, 32.3, 11.7, 11.0, 65.3, 74.3], 35.7),
    "Mixtral-8x7B-SFT": ([75.6, 16.7, 61.0, 57.6, 40.1, 25.9, 85.9, 87.5], 56.3),
    "8x7B + DPO": ([74.9, 17.2, 47.6, 55.8, 35.3, 26.9, 67.3, 75.7], 50.1),
}


def result(model: str, scores: list[float | None], **more: Any) -> dict[str, Any]:
    names = [tasks[0] for _, tasks in COLUMNS]
    found = {name: {"score": score / 100, **more} for name, score in zip(names, scores, strict=True) if score is not None}
    return {"model": model, "results": found}


def test_the_papers_table_comes_out() -> None:
    results = [result(model, list(scores)) for model, (scores, _) in PAPER.items()]
    columns, small = paper_table(results[:3])
    assert columns == ["Model", "BBH (CoT)", "LeetCode", "HumanEval", "GSM-Plus", "MATH", "TheoremQA", "SVAMP", "ASDiv", "Avg."]
    rows = [*small, *paper_table(results[3:])[1]]
    for row, (model, (scores, mean)) in zip(rows, PAPER.items(), strict=True):
        assert row[0] == model
        assert [float(cell.split()[0]) for cell in row[1:]] == [*scores, mean]
    falls = [[cell.endswith("↓") for cell in row] for row in rows]
    assert falls[0] == [False] * 10
    assert [columns[place] for place, fell in enumerate(falls[1]) if fell] == ["LeetCode", "GSM-Plus"]
    assert [columns[place] for place, fell in enumerate(falls[2]) if fell] == ["BBH (CoT)", "HumanEval"]
    assert [columns[p] for p, fell in enumerate(falls[4]) if not fell] == ["Model", "LeetCode", "TheoremQA"]
    assert "↑" not in str([rows[0], rows[3]])
    assert rows[1][1] == "61.7 ↑"
    assert rows[2][2] == "3.3"  # as before


def test_what_is_missing_or_not_comparable_has_no_arrow() -> None:
    before = result("before", [50.0, None, *[None] * 6], protocol={"limit": None})
    after = result("after", [60.0, 10.0, *[None] * 6], protocol={"limit": None})
    limited = result("limited", [60.0, None, *[None] * 6], protocol={"limit": 5})
    nothing = {"model": "nothing", "results": {}}
    _, rows = paper_table([before, after, limited, nothing])
    assert rows[0][1:3] == ["50.0", "–"]
    assert rows[1][1:3] == ["60.0 ↑", "10.0"]
    assert rows[1][-1] == "35.0 (2 of 8)"  # over other columns than the baseline's
    assert rows[2][1] == "60.0"
    assert rows[3][-1] == "–"
    assert paper_table([])[1] == []


def test_the_table_in_each_form() -> None:
    columns, rows = paper_table([result("a_b & c", [60.0] * 8), result("x", [50.0] * 8)])
    table = Table(tuple(map(Column, columns)), tuple(map(tuple, rows)))
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [columns, *rows]
    latex = to_latex(table)
    assert r"a\_b \& c & 60.0" in latex
    assert r"50.0 $\downarrow$" in latex


# -- backends and names -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(
    tmp_path: Path, tiny_model_dir: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """An adapter, with its tokenizer, on the tiny model."""
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model_dir)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_loaded_on_its_base(adapter: Path, tiny_model_dir: Path) -> None:
    base = str(tiny_model_dir)
    hf = backend_arguments(str(adapter), Backend(dtype="float32"))
    assert (hf["pretrained"], hf["peft"], hf["tokenizer"], hf["dtype"]) == (base, str(adapter), str(adapter), "float32")
    vllm = backend_arguments(str(adapter), Backend("vllm", {"gpu_memory_utilization": 0.5}))
    assert (vllm["pretrained"], vllm["lora_local_path"], vllm["gpu_memory_utilization"]) == (base, str(adapter), 0.5)
    assert "peft" not in vllm
    assert (hf["use_safetensors"], vllm["load_format"]) == (True, "safetensors")
    with pytest.raises(ValueError, match="sglang can't load"):
        backend_arguments(str(adapter), Backend("sglang"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for name in ("hf", "vllm"):
        with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
            backend_arguments(str(adapter), Backend(name))


def test_other_models_are_given_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert backend_arguments(str(tiny_model_dir), Backend())["pretrained"] == str(tiny_model_dir)
    assert "peft" not in backend_arguments(str(tiny_model_dir), Backend())
    server = backend_arguments("m", Backend("local-chat-completions", {"base_url": "u"}))
    assert server == {"model": "m", "base_url": "u"}
    with pytest.raises(ValueError, match=r"neither config\.json nor"):
        backend_arguments(str(tmp_path), Backend())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="copy the adapter again"):
        backend_arguments(str(tmp_path), Backend())


def test_a_model_is_another_when_its_files_change(adapter: Path) -> None:
    first = model_identity(str(adapter))
    assert model_identity(str(adapter)) == first
    (adapter / "adapter_model.safetensors").touch()
    assert model_identity(str(adapter)) != first
    assert model_identity("some/hub-id") != model_identity("some/other-id")


def test_a_model_is_named_by_its_run(tmp_path: Path) -> None:
    (tmp_path / "nca" / "model").mkdir(parents=True)
    assert model_name(str(tmp_path / "nca" / "model")) == "nca"
    assert model_name(str(tmp_path / "nca")) == "nca"
    assert model_name("some/hub-id") == "hub-id"


@pytest.mark.parametrize(
    ("measured", "key"),
    [
        ({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.4}, "acc_norm,none"),
        ({"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2}, "exact_match,flexible-extract"),
        ({"exact_match,get-answer": 0.1, "alias": "bbh"}, "exact_match,get-answer"),
        ({"own,none": 0.1, "name": "x"}, "own,none"),
    ],
)
def test_one_measure_stands_for_a_task(measured: dict[str, Any], key: str) -> None:
    assert score_key(measured) == key


def test_what_is_missing_is_said_before_anything_is_loaded(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning, "load_backend", lambda *_, **__: pytest.fail("a model was loaded"))
    model = str(tiny_model_dir)
    with monkeypatch.context() as patched:
        patched.setattr(reasoning.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install .*\[eval\]'"):
            run_tasks(model, ["svamp"], output_dir=tmp_path)
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    for task in ("svamp", "theoremqa", "asdiv_cot", "leetcode"):
        with pytest.raises(ValueError, match=f"task_data {task}=FILE"):
            run_tasks(model, [task], output_dir=tmp_path)
    with pytest.raises(ValueError, match="no file"):
        run_tasks(model, ["svamp"], task_data={"svamp": tmp_path / "none.json"}, output_dir=tmp_path)
    with pytest.raises(ValueError, match="not among the tasks"):
        run_tasks(model, ["humaneval"], task_data={"svamp": tmp_path / "none.json"}, output_dir=tmp_path)
    with pytest.raises(ValueError, match="no task is named"):
        run_tasks(model, [], output_dir=tmp_path)
    with pytest.raises(ValueError, match="limit is 0"):
        run_tasks(model, ["svamp"], protocol=TaskProtocol(limit=0), output_dir=tmp_path)


# -- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(write_jsonl: Callable[..., Path]) -> dict[str, Path]:
    """A file of three questions for each set, and of two programs."""
    files = {task: write_jsonl([row] * 3, f"{task}.jsonl") for task, (row, _) in ROWS.items()}
    problem = {"task_id": "a", "prompt": "def f():\n", "test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}
    files["humaneval"] = write_jsonl([problem, {**problem, "task_id": "b"}], "humaneval.jsonl")
    return files


def answering(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    """Let lm-eval's model answer every question so; what it was asked is returned."""
    from lm_eval.models.huggingface import HFLM

    asked: list[str] = []

    def generate_until(self: object, requests: list[Any], **_: object) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return [text] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return asked


@needs_lm_eval
@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_tasks_are_run_kept_and_resumed(
    tmp_path: Path, adapter: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, "    return 1\n\nThe answer is 8.")
    backend = Backend(device="cpu", dtype="float32")
    options: dict[str, Any] = {"output_dir": tmp_path / "out", "backend": backend, "task_data": data}
    found = run_tasks(str(adapter), list(data), **options)
    # An adapter's folder is called by the run that it lies in.
    assert found["model"] == adapter.parent.name
    assert found["failed"] == {}
    scores = {task: each["score"] for task, each in found["results"].items()}
    # The answer to SVAMP's question is 8; a text after a function's body is no Python.
    assert scores == {"svamp": 1.0, "gsm_plus": 0.0, "asdiv_cot": 0.0, "theoremqa": 0.0, "humaneval": 0.0}
    assert [each["num_samples"] for each in found["results"].values()] == [3, 3, 3, 3, 2]
    svamp = next(text for text in asked if "8 birds" in text)
    assert svamp.count("Question:") == 5
    assert svamp.endswith("Question: There are 8 birds. How many?\nAnswer:")
    assert asked.count("def f():\n") == 2
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "svamp.jsonl").read_text().splitlines()]
    assert [sample["measured"] for sample in samples] == [{"exact_match": 1.0}] * 3

    del asked[:]
    again = run_tasks(str(adapter), list(data), **options)
    assert again["results"] == found["results"]
    assert again["resumed"] == list(data)
    assert asked == []
    no_examples = {"task_data": {"svamp": data["svamp"]}, "protocol": TaskProtocol(num_fewshot=0)}
    run_tasks(str(adapter), ["svamp"], **{**options, **no_examples})
    assert len(asked) == 3  # other settings are another measurement
    assert all(text.count("Question:") == 1 for text in asked)


@needs_lm_eval
@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_programs_wait_for_walls_or_for_the_users_word(
    tmp_path: Path,
    tiny_model_dir: Path,
    data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sandbox, "_WITHOUT", ("seccomp",))
    asked = answering(monkeypatch, "    return 1")
    words = ["evaluate", "--model", str(tiny_model_dir), "--output_dir", str(tmp_path / "out"), "--json"]
    words += ["--tasks", "humaneval", "--task_data", f"humaneval={data['humaneval']}"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"only behind {sandbox.MINIMUM}" in said
    assert "no seccomp (left out)" in said
    assert "--allow_weak" in said
    assert asked == []  # refused before a model is asked
    assert main([*words, "--allow_weak"]) == 0
    found = capsys.readouterr()
    assert "does not refuse network" in found.err
    measured = json.loads(found.out)["models"][0]["results"]["humaneval"]
    assert measured["score"] == 1.0
    assert "seccomp" not in measured["isolation"]


@needs_lm_eval
@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_code_is_asked_for_in_a_chat_and_counted(
    tmp_path: Path, tiny_model_dir: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, "```python\ndef f():\n    return 1\n```")
    found = run_tasks(
        str(tiny_model_dir),
        ["humaneval"],
        output_dir=tmp_path / "out",
        backend=Backend(device="cpu"),
        protocol=TaskProtocol(apply_chat_template=True),
        task_data={"humaneval": data["humaneval"]},
    )
    measured = found["results"]["humaneval"]
    assert measured["metrics"] == {"pass@1": 1.0}
    assert measured["protocol"]["temperature"] == 0.0
    assert "seccomp" in measured["isolation"]
    assert len(asked) == 2
    assert asked[0].startswith("<|im_start|>user\n")
    assert asked[0].endswith("<|im_start|>assistant\n")


@needs_lm_eval
def test_a_real_model_generates_and_an_adapter_changes_it(
    tmp_path: Path, tiny_model_dir: Path, adapter: Path, data: dict[str, Path]
) -> None:
    answers = {}
    for name, model in (("base", tiny_model_dir), ("adapter", adapter)):
        out = tmp_path / name
        found = run_tasks(
            str(model),
            ["gsm_plus"],
            output_dir=out,
            task_data={"gsm_plus": data["gsm_plus"]},
            backend=Backend(arguments={"max_length": 768}, batch_size=2, device="cpu", dtype="float32"),
            protocol=TaskProtocol(limit=2, num_fewshot=0),
        )
        assert found["results"]["gsm_plus"]["num_samples"] == 2
        assert found["results"]["gsm_plus"]["protocol"]["limit"] == 2
        lines = (out / "samples" / "gsm_plus.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line)["resps"] for line in lines]
    assert answers["base"] != answers["adapter"]


@needs_lm_eval
@pytest.mark.slow
def test_one_failing_task_costs_no_other(
    tmp_path: Path, tiny_model_dir: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, "The answer is 8.")
    options: dict[str, Any] = {"output_dir": tmp_path / "out", "backend": Backend(device="cpu")}
    options["protocol"] = TaskProtocol(num_fewshot=2)
    gsm8k = tmp_path / "gsm8k.jsonl"
    gsm8k.write_text(
        "".join(json.dumps({"question": f"{i} + 0?", "answer": f"It is {i}.\n#### {i}"}) + "\n" for i in range(6, 12))
    )
    found = run_tasks(
        str(tiny_model_dir),
        ["asdiv_cot_llama", "svamp", "gsm8k"],
        task_data={"svamp": data["svamp"], "gsm8k": gsm8k},
        **options,
    )
    assert list(found["results"]) == ["svamp", "gsm8k"]
    assert found["results"]["gsm8k"]["score"] == pytest.approx(1 / 6)
    assert found["results"]["gsm8k"]["metric"] == "exact_match,flexible-extract"
    assert list(found["failed"]) == ["asdiv_cot_llama"]
    assert "task_data asdiv_cot_llama=FILE" in found["failed"]["asdiv_cot_llama"]
    samples = (tmp_path / "out" / "samples" / "gsm8k.jsonl").read_text()
    assert samples.count('"filter": "flexible-extract"') == 6
    with pytest.raises(ValueError, match="every task failed"):
        run_tasks(str(tiny_model_dir), ["asdiv_cot_llama"], **options)
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        run_tasks(str(tiny_model_dir), ["gsm88k"], **options)
    with pytest.raises(ValueError, match="'nonsense' can't be made"):
        run_tasks(
            str(tiny_model_dir),
            ["svamp"],
            backend=Backend("nonsense"),
            task_data={"svamp": data["svamp"]},
            output_dir=tmp_path / "b",
        )


@needs_lm_eval
def test_a_backend_generates_as_any_generator_does(tiny_model_dir: Path) -> None:
    backend = Backend(batch_size=4, device="cpu", dtype="float32")
    generator = BackendGenerator(load_backend(backend, backend_arguments(str(tiny_model_dir), backend)), until=["\n"])
    prompts: list[Any] = ["What is", [{"role": "user", "content": "What is"}], "The answer"]
    greedy = generator.generate(prompts, num_samples=2, params=SamplingParams(8, temperature=0.0), seed=0)
    assert all(first == second for first, second in greedy)
    assert all("\n" not in completion.text for row in greedy for completion in row)
    # The same prompts alone: an answer does not depend on what stands beside it in the batch.
    for prompt, row in zip(prompts, greedy, strict=True):
        alone = generator.generate([prompt], num_samples=1, params=SamplingParams(8, temperature=0.0), seed=0)
        assert alone[0][0].text == row[0].text
    params = SamplingParams(8, temperature=1.0, top_p=0.9, top_k=50)
    state = torch.get_rng_state()
    drawn = [generator.generate(prompts, num_samples=4, params=params, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({completion.text for completion in drawn[0][0]}) > 1

"""Every verb, killed with kill -9 at random moments and run again, leaves what it leaves undisturbed, byte for byte."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import build_model, build_tokenizer, group_row
from kill_runs import Commands, Done
from server_double import ServerDouble, echo, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked"),
]
NUM_KILLS = 10
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
REWARDS = """
def vowels(prompt, completions):
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]
"""
SAMPLING = "--max_new_tokens 6 --dtype float32"
SERVER = "--{0}.base_url {{url}} --{0}.model m --{0}.max_concurrency 2"
TRAIN = (
    "train --model {i}/model --data {i}/groups.jsonl --output_dir {o}/run --cache_dir {o}/cache --resume --save_steps 1 "
    "--max_steps 6 --per_device_train_batch_size 4 --learning_rate 1e-3 --eval_fraction 0.2 --report_to [] --dtype float32 "
    "--scoring_dtype float32"
)
ONLINE = (
    "online --model {i}/model --data {i}/prompts.jsonl --output_dir {o}/run --cache_dir {o}/cache "
    "--reward {i}/rewards.py:vowels --num_samples 3 --max_new_tokens 6 --max_length 64 --per_device_train_batch_size 2 "
    "--max_steps 4 --regenerate_every 2 --learning_rate 1e-3 --eval_fraction 0.2 --chunk_size 3 --save_steps 1 --report_to [] "
    "--dtype float32 --scoring_dtype float32 --generator server --server.base_url {url} --server.model base "
    "--probe_tolerance none --string_prompts raw --lora.r 2"
)


@dataclass(frozen=True)
class Case:
    """A command, and how it is run.

    Attributes:
        command: its words; {i} is the folder of inputs, {o} that of outputs, {url} the server.
        processes: how many at a time.
        kills: how many times it is killed.
    """

    command: str
    processes: int = 1
    kills: int = NUM_KILLS


CASES = {
    "adjust": Case("adjust {i}/many.jsonl {o}/out.jsonl --steps zscore,clip:-1:1"),
    "convert a file": Case("convert {i}/pairs.jsonl {o}/out.parquet"),
    "convert a folder": Case("convert {i}/shards {o}/out"),
    "convert a folder whose rows are joined": Case("convert {i}/joined {o}/out"),
    "audit": Case("audit {i}/many.jsonl --output_dir {o}/out"),
    "answer": Case(
        f"answer --model {{i}}/model --set {{i}}/questions.jsonl --output {{o}}/a.jsonl --cache_dir {{o}}/cache "
        f"--batch_size 4 {SAMPLING}"
    ),
    "answer, a server": Case(
        "answer --set {i}/questions.jsonl --output {o}/a.jsonl --cache_dir {o}/cache " + SERVER.format("server")
    ),
    "generate": Case(
        f"generate --model {{i}}/model --prompts {{i}}/prompts.jsonl --output {{o}}/g.jsonl --batch_size 4 {SAMPLING}"
    ),
    "generate, a server": Case(
        "generate --prompts {i}/prompts.jsonl --output {o}/g.jsonl --num_samples 2 " + SERVER.format("server")
    ),
    "score": Case("score --data {i}/many.jsonl --output {o}/s.jsonl --reward {i}/rewards.py:vowels"),
    "score, a judge": Case(
        "score --data {i}/groups.jsonl --output {o}/s.jsonl --reward judge --cache_dir {o}/cache " + SERVER.format("judge")
    ),
    "evaluate": Case(
        "evaluate --model {i}/a.jsonl --against {i}/b.jsonl --set {i}/questions.jsonl --judge.mode labels --output_dir "
        "{o}/e --cache_dir {o}/cache --num_resamples 100 " + SERVER.format("judge")
    ),
    "evaluate, tasks": Case(
        "evaluate --model {i}/model --tasks svamp,gsm_plus --task_data svamp={i}/svamp.jsonl,gsm_plus="
        "{i}/gsm_plus.jsonl --output_dir {o}/e --limit 2 --num_fewshot 0 --dtype float32",
    ),
    "demo": Case("demo --quick --model {i}/model --output_dir {o}/demo", kills=4),
    "online, adapters pushed": Case(ONLINE + " --push lora"),
    "online, folders pushed": Case(ONLINE + " --push folder"),
    "train": Case(TRAIN),
    "train, two processes": Case(TRAIN, processes=2),
}


def judged(body: dict[str, Any], number: int) -> str:
    """What the server says: verdicts where it is asked for one, else a text that depends on what it is asked."""
    asked = body.get("prompt") or body["messages"][-1]["content"]
    chance = random.Random(f"{asked} {number}")
    if "[[A>B]]" in json.dumps(body) or "[[A>>B]]" in json.dumps(body):
        return chance.choice(["[[A>>B]]", "[[A>B]]", "[[A=B]]", "[[B>A]]"])
    if "Rating" in json.dumps(body) or "[[" in json.dumps(body):
        return f"[[{chance.randint(1, 10)}]]"
    return echo(body, number) + " " + "".join(chance.choice("aeiouxyz") for _ in range(12))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and a file of each kind that verbs read."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.config.max_position_embeddings = 2048  # tasks ask for 512 tokens
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    rewards = [[1.0, 0.0], [0.1, 0.9, 0.4], [0.2, 0.0, 0.6, 1.0]]
    write("groups.jsonl", [group_row(k, rewards[k % 3]) for k in range(12)])
    write("many.jsonl", [group_row(k, rewards[k % 3]) for k in range(1500)])
    write("prompts.jsonl", [{"id": str(k), "prompt": f"What is {k} times {k + 3}?"} for k in range(16)])
    pairs = [{"prompt": f"Q{k // 2}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(6000)]
    write("pairs.jsonl", pairs)
    for shard in range(6):
        rows = [group_row(k, rewards[k % 3]) | {"id": f"s{shard}-{k}"} for k in range(600)]
        write(f"shards/part-{shard}.jsonl", rows)
        write(f"joined/part-{shard}.jsonl", pairs[1000 * shard + shard : 1000 * shard + 1000])
    questions = [f"What is {k} plus {k}?" for k in range(12)]
    write("questions.jsonl", [{"question_id": f"q{k}", "turns": [text]} for k, text in enumerate(questions)])
    for name in "ab":
        write(f"{name}.jsonl", [{"question": f"q{k}", "model": name, "turns": [f"{name} says {k}"]} for k in range(12)])
    write("svamp.jsonl", [{"ID": "1", "Body": "There are 8 birds.", "Question": "How many?", "Answer": 8.0}] * 3)
    write("gsm_plus.jsonl", [{"question": "There are 9 birds. How many?", "answer": "9"}] * 3)
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    imports = ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface") if HAS_LM_EVAL else ()
    found = Commands(tmp_path_factory.mktemp("commands") / "log", *imports)
    yield found
    found.close()


@pytest.fixture(scope="module")
def double() -> Iterator[tuple[ServerDouble, str]]:
    found = ServerDouble(judged)
    found.delay = 0.02
    with serving(found) as url:
        yield found, url


# Times; and what a call took from an earlier one.
TIMES = {"seconds", "tokens_per_second", "tstamp"}
VOLATILE = TIMES | {"remembered", "requests", "prompt_tokens", "completion_tokens", "resumed"}


def steady(value: Any) -> Any:
    """A JSON value without what differs from call to call."""
    if isinstance(value, dict):
        return {name: steady(inner) for name, inner in value.items() if name not in VOLATILE}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """All that a command left but caches, times and the times of checkpoints."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # Checksums of checkpoints are of states that hold times.
        if not path.is_file() or any(part in name for part in ("cache/", "tensorboard/", "answers.sqlite", "checksums.json")):
            continue
        if path.suffix == ".json":
            found[name] = steady(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [steady(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".html":
            found[name] = path.stat().st_size > 0  # pages show times
        elif path.parent.name == "tables" or path.name == "README.md":
            found[name] = path.stat().st_size > 0  # as results.json has it
        else:
            found[name] = path.read_bytes()
    return found


def is_done(done: Done) -> bool:
    """Whether a command that was run again has nothing left to do: what it writes is there, and nothing replaces it unasked."""
    return done.code == 0 or (done.code == 1 and "--overwrite replaces it" in done.said)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments_and_run_again(
    name: str, inputs: Path, tmp_path: Path, double: tuple[ServerDouble, str], commands: Commands
) -> None:
    if "tasks" in name and not HAS_LM_EVAL:
        pytest.skip("lm-eval is not installed")
    case, (server, url), chance = CASES[name], double, random.Random(name)
    out, landed = tmp_path / "out", 0
    words = case.command.format(i=inputs, o=out, url=url).split()

    def run(kill_after: float | None = None) -> Done:
        return commands.run(words, kill_after=kill_after, processes=case.processes)

    def empty() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    empty()
    whole = run()
    assert whole.code == 0, whole.said
    expected, asked = outcome(out), len(server.requests)
    empty()
    # Without what the first run took for the system to have everything at hand.
    seconds = run().seconds
    asked = len(server.requests) - asked
    for _ in range(5 * case.kills):
        empty()
        before, kills = len(server.requests), 1
        moment = seconds * (landed + chance.random()) / case.kills
        done = run(kill_after=moment)
        if done.code == -9:
            landed += 1
        else:  # the machine has less to do than it had
            seconds = min(seconds, done.seconds)
        if chance.random() < 0.5:
            done, kills = run(kill_after=chance.uniform(0, seconds)), 2
        if not is_done(done):
            done = run()
        assert is_done(done), f"killed after {moment:.2f} of {seconds:.2f} s: {done.said}"
        assert outcome(out) == expected, f"killed after {moment:.2f} of {seconds:.2f} s"
        assert not list(out.rglob(".*.tmp"))
        if not name.startswith("online"):  # which asks the server to load weights, too
            # What was under way is asked again, also what the server takes late; nothing that was answered is.
            assert len(server.requests) - before <= asked + 2 * kills + 2
        if landed == case.kills:
            break
    assert landed == case.kills

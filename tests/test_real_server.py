"""A real OpenAI-compatible server (llama.cpp) with a real small model: the client, generation, a judge, and the probe."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group, read_groups
from ncalign.demo.model import _find_gguf, demo_model_folder
from ncalign.generation.base import SamplingParams
from ncalign.generation.config import ServerConfig
from ncalign.generation.remote import ServerGenerator
from ncalign.judging.config import EvaluateConfig
from ncalign.judging.evaluate import run_evaluate
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.rewards.config import JudgeConfig
from ncalign.rewards.judge import JudgeReward

pytestmark = pytest.mark.slow

SERVE = """
import sys, time
import xllamacpp as xlc
params = xlc.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.port = 4096, 4, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.use_jinja = True
server = xlc.Server(params)
print("LISTENING", server.listening_address, flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A llama.cpp server with SmolLM2-135M-Instruct."""
    pytest.importorskip("xllamacpp")
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-c", SERVE, str(_find_gguf(Path(work)))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("LISTENING"):
                    yield line.split()[1].rstrip("/") + "/v1"
                    break
        finally:
            process.kill()
            process.communicate()


def test_generation(url: str, tmp_path: Path) -> None:
    config = ServerConfig(base_url=url, max_concurrency=4)
    generator = ServerGenerator(config, store=Store(tmp_path / "answers"), progress=False)
    prompts: list[Any] = ["The capital of France is", [{"role": "user", "content": "What is 2 + 2?"}]]
    found = generator.generate(prompts, num_samples=3, params=SamplingParams(12), seed=1)
    assert [len(row) for row in found] == [3, 3]
    for completion in (one for row in found for one in row):
        assert completion.text.strip()
        assert completion.num_tokens <= 13
        assert completion.logprob is not None
        assert -150 < completion.logprob < 0
    assert len({completion.text for completion in found[0]}) > 1


def test_a_judge_is_driven_end_to_end(url: str, tmp_path: Path) -> None:
    template = tmp_path / "judge.txt"
    # A model of this size needs its verdict put into its mouth; what is tested is the way there and back.
    template.write_text("Say exactly [[7]] and nothing else.\n\nquestion: {prompt}\nanswer: {completion}\n")
    judge = JudgeReward(JudgeConfig(base_url=url, template=template, max_tokens=24), Store(tmp_path / "verdicts"))
    rewards = judge.score(Group(id="g", prompt="Say hi.", candidates=[Candidate("Hi!"), Candidate("No.")]))
    assert judge.account.asked == 2
    assert len(rewards) == 2
    assert sum(reward is None for reward in rewards) == judge.account.missing.total()
    assert all(reward is None or 1 <= reward <= 10 for reward in rewards)


def test_the_probe_tells_the_served_model_from_a_trained_one(url: str, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": [{"role": "user", "content": f"Say a word with {i + 3} letters."}]} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text("def brief(prompt, completions):\n    return [-len(text) for text in completions]\n")
    config = OnlineConfig.model_validate(
        {
            "model": str(demo_model_folder()),
            "data": tmp_path / "prompts.jsonl",
            "output_dir": tmp_path / "run",
            "reward": f"{tmp_path / 'rewards.py'}:brief",
            "generator": "server",
            "server": {"base_url": url, "max_concurrency": 4},
            "push": "none",
            # The server computes with weights and activations of 4 and 8 bits.
            "probe_tolerance": 0.3,
            "num_samples": 3,
            "max_new_tokens": 12,
            "max_length": 128,
            "lora": {"r": 8},
            "learning_rate": 3e-2,
            "warmup_ratio": 0.0,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "regenerate_every": 4,
            "report_to": (),
        }
    )
    # Round 1 samples from the policy. Then the policy moves, and nobody told the server.
    with pytest.raises(ValueError, match=r"round 2: server \S+ and policy hold different weights"):
        run_online(config)
    assert len(list(read_groups(tmp_path / "run" / "rounds" / "000" / "pool.jsonl"))) == 4


def test_answers_are_judged_end_to_end(url: str, tmp_path: Path) -> None:
    """A model of this size is no judge; what is tested is the way there and back, with log-probs that are real."""
    questions = [{"question_id": k, "turns": [f"Name {k + 2} animals."]} for k in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name, text in (("long", "The animals are a cat, a dog, a cow and many more that one could name."), ("short", "Cat.")):
        rows = [json.dumps({"question": str(k), "model": name, "turns": [f"{text} ({k})"]}) for k in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "model": str(tmp_path / "long.jsonl"),
        "against": [str(tmp_path / "short.jsonl")],
        "set_name": str(tmp_path / "q.jsonl"),
        "cache_dir": tmp_path / "cache",
        "num_resamples": 200,
    }
    judge = {"base_url": url, "max_concurrency": 4, "max_tokens": 48, "attempts": 1}
    found = run_evaluate(EvaluateConfig.model_validate({**settings, "output_dir": tmp_path / "pairs", "judge": judge}))
    account = found["verdicts"][0]
    assert account["mode"] == "logprobs"
    assert (account["asked"], found["missing_verdicts"]) == (12, 0)
    games = [json.loads(line) for line in (tmp_path / "pairs" / "games.jsonl").read_text().splitlines()]
    # A letter that is not among the likeliest twenty has no share.
    assert all(0 <= game["preference"] <= 1 for game in games)
    rate = found["win_rates"]["long"]
    assert rate["win_rate"] == pytest.approx(100 * sum(game["preference"] for game in games) / len(games))
    assert found["judge"]["position"]["num_pairs"] == 6

"""What the benchmarks of training steps share: each side in a process of its own, taking turns, medians of their ratios.

A side trains SmolLM2-135M, or random weights, with AdamW on random tokens of exact lengths: ``groups`` prompts of ``prompt``
tokens with ``candidates`` completions of ``completion`` tokens. The first step warms up; of each later one the process's CPU
time is taken, on a GPU the time until it has finished. Peak memory is the highest resident size of the process, on a GPU what
PyTorch has allocated there; model, gradients and optimizer included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("trl", "trl_defaults", "padded", "ours")
# Sizes of Llama-like models.
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32_000},
}
HEADS = {"tiny": (4, 2), "1b": (32, 8)}
"""Of queries, and of keys and values."""


@dataclass(frozen=True)
class Case:
    """One side and its work.

    Attributes:
        side: ``trl`` (DPOTrainer, reference precomputed, no activation checkpointing), ``trl_defaults`` (as it comes),
            ``padded`` (a plain loop over padded pairs with a chunked head), ``ours``.
        objective: of ours, as JSON; the others run DPO.
        prompt: tokens of each prompt.
        completion: tokens of each completion.
        candidates: completions of a prompt; DPO of the others uses two.
        groups: prompts in a step.
        dtype: float32 or bfloat16 (autocast over float32 weights).
        steps: measured steps.
        options: of ours, fields of the run's configuration; without `scoring_dtype`, candidates are scored as `auto` picks.
        shape: of random weights, one of SHAPES; none: SmolLM2-135M.
        device: cpu or cuda.
    """

    side: str
    objective: str = '{"name": "dpo"}'
    prompt: int = 256
    completion: int = 64
    candidates: int = 2
    groups: int = 2
    dtype: str = "float32"
    steps: int = 2
    options: str = "{}"
    shape: str = ""
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    """Of one process: CPU seconds of a step (median; on a GPU plain seconds), peak memory in MiB, and the first loss."""

    cpu_seconds: float
    peak_mib: float
    loss: float


def run_case(case: Case, *, threads: int = 2) -> Measured:
    """One side in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if case.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{case} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def interleaved(cases: Mapping[str, Case], *, repeats: int) -> dict[str, list[Measured]]:
    """Each case ``repeats`` times, in turns, the order turned round every other time."""
    found: dict[str, list[Measured]] = {name: [] for name in cases}
    for repeat in range(repeats):
        names = list(cases) if repeat % 2 == 0 else list(cases)[::-1]
        for name in names:
            measured = run_case(cases[name])
            found[name].append(measured)
            print(
                f"  {repeat + 1}/{repeats} {name:28} {measured.cpu_seconds:7.2f} cpu-s/step  {measured.peak_mib:6.0f} MiB  "
                f"loss {measured.loss:.4f}",
                flush=True,
            )
    return found


def ratio_row(
    name: str,
    over: Sequence[Measured],
    under: Sequence[Measured],
    *,
    goal: float | None,
    at_least: bool,
    conditions: str,
    key: Callable[[Measured], float] = lambda measured: measured.cpu_seconds,
) -> dict[str, object]:
    """A row of results: the median of the turns' ratios ``over / under``, against a goal."""
    ratios = [key(a) / key(b) for a, b in zip(over, under, strict=True)]
    return row(name, ratios, goal=goal, at_least=at_least, conditions=conditions)


def row(
    name: str, values: Sequence[float], *, goal: float | None, at_least: bool = False, conditions: str
) -> dict[str, object]:
    """A row of results from repeated values."""
    value = median(values)
    holds = None if goal is None else (value >= goal if at_least else value <= goal)
    return {
        "name": name,
        "value": round(value, 6),
        "goal": goal,
        "holds": holds,
        "spread": [round(min(values), 6), round(max(values), 6)],
        "conditions": f"{conditions}; {machine()}",
    }


def peak(measured: Measured) -> float:
    """Peak memory, as a key of `ratio_row`."""
    return measured.peak_mib


def machine() -> str:
    """What the numbers were made on and with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return f"{os.cpu_count()} cores {platform.machine()}, {packages}"


def processor() -> str:
    """The processor's kind, by what `dtype: auto` picks on it: ``bf16`` or ``fp32-only``."""
    program = "from ncalign.model.precision import fast_precision; print(fast_precision('cpu').precision)"
    # In a process of its own: this one stays small.
    picked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    return {"bfloat16": "bf16", "float32": "fp32-only"}[picked]


def describe(case: Case, repeats: int) -> str:
    """A case's sizes, for `conditions`."""
    return (
        f"SmolLM2-135M, P={case.prompt}, T={case.completion}, {case.groups} groups a step, {case.dtype}, AdamW, CPU time of a "
        f"step, medians of {repeats} turns in fresh processes"
    )


def main_of(
    measure: Callable[[argparse.Namespace], list[dict[str, object]]],
    description: str,
    *,
    parser: argparse.ArgumentParser | None = None,
    prepare: Callable[[argparse.Namespace], None] | None = None,
) -> int:
    """The command line that all scripts share: measure, print the rows, write them; 1 when a goal does not hold.

    Args:
        measure: gives the rows.
        description: of the script.
        parser: with further flags.
        prepare: what is done first, in place of :func:`prepare_model`.
    """
    parser = parser or argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if prepare is None:
        prepare_model()
    else:
        prepare(arguments)
    rows = measure(arguments)
    print(f"\n{'what':72} {'value':>8} {'goal':>8}  holds")
    for found in rows:
        goal = "-" if found["goal"] is None else f"{found['goal']}"
        print(f"{found['name']!s:72} {found['value']:8.4g} {goal:>8}  {found['holds']}  {found['spread']}")
    if arguments.json is not None:
        temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.json)
    return 0 if all(found["holds"] is not False for found in rows) else 1


def prepare_model() -> None:
    """Make the model's folder before anything is measured (in a process of its own: this one stays small)."""
    subprocess.run([sys.executable, "-c", "from ncalign.demo.model import demo_model_folder; demo_model_folder()"], check=True)


# --- In the child process ---------------------------------------------------------------------------------------------


def tokens(case: Case, *, vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Random prompts and completions, the same for every side; one list of groups, enough for all steps."""
    import random

    source = random.Random(0)

    def draw(count: int) -> list[int]:
        return [source.randrange(100, vocabulary) for _ in range(count)]

    number = case.groups * (case.steps + 1)
    return [(draw(case.prompt), [draw(case.completion) for _ in range(case.candidates)]) for _ in range(number)]


def measure_case(case: Case) -> Measured:
    """Run a side in this process."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = {"trl": _trl, "trl_defaults": _trl, "padded": _padded, "ours": _ours}[case.side]
    seconds, loss = run(case, folder_of(case))
    return Measured(median(seconds[1:]), memory_mib(case.device), loss)


def folder_of(case: Case) -> Path | None:
    """Where the model lies; None for random weights."""
    from ncalign.demo.model import demo_model_folder

    return None if case.shape else demo_model_folder()


def model_of(case: Case, folder: Path | None) -> Any:
    """The model in float32, on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(case.device)
    torch.manual_seed(0)
    heads, kv_heads = HEADS[case.shape]
    config = LlamaConfig(**SHAPES[case.shape], num_attention_heads=heads, num_key_value_heads=kv_heads, pad_token_id=0)
    config.bos_token_id, config.eos_token_id = None, 1
    with torch.device(case.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tokenizer_of(folder: Path | None) -> Any:
    """Its tokenizer; for random weights one of a few words, since the tokens are random too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(("<pad>", "<eos>", "a", "b", "c"))}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="a")


def now(device: str) -> float:
    """Seconds of a clock: the process's CPU time; on a GPU the time at which it has done what it was given."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory_mib(device: str) -> float:
    """The highest resident size of this process so far, or what was allocated on its GPU."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def _references(case: Case, folder: Path | None, groups: list[Any]) -> list[list[float]]:
    """Log-probs of the starting model in the side's precision: not measured, and the same for all."""
    import torch

    model = model_of(case, folder).eval()
    found = []
    for prompt, completions in groups:
        ids = torch.tensor([prompt + completion for completion in completions], device=case.device)
        with torch.no_grad(), torch.autocast(case.device, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(completions[0]) + 1).logits[:, :-1].float()
        targets = ids[:, -len(completions[0]) :]
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        found.append(chosen.sum(-1).tolist())
    return found


def _trl(case: Case, folder: Path | None) -> tuple[list[float], float]:
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    tokenizer = tokenizer_of(folder)
    groups = tokens(case, vocabulary=vocabulary_of(case, tokenizer))
    defaults = case.side == "trl_defaults"
    matched = {} if defaults else {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = now(case.device)

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            seconds.append(now(case.device) - self.started)

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=case.groups,
            max_steps=case.steps + 1,
            beta=0.1,
            learning_rate=5e-6,
            max_length=case.prompt + case.completion,
            bf16=case.dtype == "bfloat16",
            use_cpu=case.device == "cpu",
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
            **matched,
        )
        rows = [{"prompt_ids": p, "chosen_ids": c[0], "rejected_ids": c[1]} for p, c in groups]
        if not defaults:
            for example, reference in zip(rows, _references(case, folder, groups), strict=True):
                example |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
            forget_memory(case.device)
        words = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
        # What has no folder TRL can't load again; with its log-probs at hand no reference is kept.
        again = None if folder is not None or not defaults else model_of(case, folder)
        trainer = DPOTrainer(
            model_of(case, folder),
            again,
            args=config,
            train_dataset=words,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds, losses[0]


def forget_memory(device: str) -> None:
    """On a GPU, count the highest allocation anew: references are not part of what is measured."""
    import gc

    import torch

    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def vocabulary_of(case: Case, tokenizer: Any) -> int:
    """How many tokens there are to draw from."""
    return int(SHAPES[case.shape]["vocab_size"]) if case.shape else len(tokenizer)


def _padded(case: Case, folder: Path | None) -> tuple[list[float], float]:
    """What a careful engineer writes: padded pairs, logits of completion positions in recomputed chunks, AdamW."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    groups = tokens(case, vocabulary=vocabulary_of(case, tokenizer_of(folder)))
    references = _references(case, folder, groups)
    forget_memory(case.device)
    model = model_of(case, folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, fused=True)

    def chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(hidden).float()
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    def logprobs(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, case.prompt - 1 : -1]
        hidden, targets = hidden.flatten(0, 1), ids[:, case.prompt :].flatten()
        size = max(1, 2**22 // model.config.vocab_size)
        parts = [
            checkpoint(chunk, h, t, use_reentrant=False) for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(parts).view(len(ids), case.completion).sum(-1)

    seconds, first = [], 0.0
    for step in range(case.steps + 1):
        started = now(case.device)
        part = slice(step * case.groups, (step + 1) * case.groups)
        ids = torch.tensor([p + c[k] for k in (0, 1) for p, c in groups[part]], device=case.device)
        reference = torch.tensor([r[k] for k in (0, 1) for r in references[part]], device=case.device)
        with torch.autocast(case.device, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
            chosen, rejected = (logprobs(ids) - reference).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(case.device) - started)
        first = first if step else float(loss.detach())
    return seconds, first


def _ours(case: Case, folder: Path | None) -> tuple[list[float], float]:
    """Ncalign's own step: `Loop.step` over its engine."""
    losses: list[float] = []
    loop = make_loop(case, folder)
    forget_memory(case.device)
    seconds = []
    for step in range(case.steps + 1):
        started = now(case.device)
        loop.step(step)
        seconds.append(now(case.device) - started)
        losses.append(loop.means.means()["loss"])
    return seconds, losses[0]


def make_loop(case: Case, folder: Path | None) -> Any:
    """The training loop that `ncalign train` would run on this case."""
    import numpy as np
    import torch
    from pydantic import TypeAdapter

    from ncalign.model.encoding import EncodedGroup
    from ncalign.model.policy import Policy, load_policy
    from ncalign.objectives import ObjectiveConfig, build_method
    from ncalign.training.config import TrainConfig
    from ncalign.training.engine import Pass
    from ncalign.training.loop import Intervals, Loop
    from ncalign.training.precision import with_precision
    from ncalign.training.schedule import DataPlan
    from ncalign.training.train import make_accelerator, make_engine

    options = json.loads(case.options)
    config = TrainConfig(
        model=str(folder),
        data=Path("unused"),
        output_dir=Path("unused"),
        dtype=case.dtype,
        objective=TypeAdapter(ObjectiveConfig).validate_json(case.objective),
        per_device_train_batch_size=case.groups,
        report_to=(),
        **{"max_tokens_per_batch": 10**9, **options},
    )
    accelerator, method = make_accelerator(config), build_method(config.objective)
    config = with_precision(config, accelerator, method)
    if folder is None:
        policy = Policy(model_of(case, None), tokenizer_of(None), "random", "random", on_adapter=False)
    else:
        policy = load_policy(str(folder), dtype=case.dtype)
    encoded = [
        EncodedGroup(
            id=str(number),
            origin="benchmark",
            prompt=np.array(prompt, dtype=np.int32),
            completions=tuple(np.array(c, dtype=np.int32) for c in completions),
            rewards=tuple(float(len(completions) - k) for k in range(len(completions))),
            reference_logprobs=(None,) * len(completions),
        )
        for number, (prompt, completions) in enumerate(tokens(case, vocabulary=vocabulary_of(case, policy.tokenizer)))
    ]
    engine, optimizer = make_engine(config, policy, method, accelerator, tokens=[group.num_tokens for group in encoded])
    references = [engine.score(engine.batch(Pass([0], [group], True)))[0].tolist() for group in encoded]
    encoded = [replace(g, reference_logprobs=tuple(r)) for g, r in zip(encoded, references, strict=True)]
    plan = DataPlan(num_groups=len(encoded), groups_per_step=case.groups, num_steps=case.steps + 1, seed=0)
    torch.manual_seed(0)
    return Loop(
        engine=engine,
        optimizer=optimizer,
        plan=plan,
        groups=encoded,
        eval_groups=(),
        learning_rate=lambda step: 5e-6,
        max_grad_norm=1.0,
        intervals=Intervals(1, 0, 0),
        log=lambda metrics: None,
    )


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    print(json.dumps(asdict(measure_case(Case(**json.loads(sys.argv[2]))))))

"""Peak memory of the vocabulary head: ncalign's chunked log-probs against log_softmax of all logits.

The head alone: random hidden states and a bias-free linear layer, forward and backward, gradients to both. Each measurement
is a process of its own, in which the highest resident memory is reset just before the head runs; what is reported is the peak
above the memory held at that point. The two sides take turns, so that a busy machine hurts both alike.

Run it with ``python benchmarks/head_memory.py [--json FILE]`` (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

GOAL = 0.35
SIDES = ("full", "ncalign")


def main() -> int:
    """Measure both sides and print a table; 0 when the goal is met."""
    arguments = parse()
    if arguments.side is not None:
        print(json.dumps(measure(arguments)))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        print("error: this benchmark reads peak memory from /proc, which only Linux has", file=sys.stderr)
        return 1
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(arguments.repeats):
        # Alternate who goes first.
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            measured[side].append(in_fresh_process(arguments, side))
    rows = results(arguments, measured)
    print_table(arguments, measured, rows)
    if arguments.json is not None:
        temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.json)
    return 0 if rows[0]["holds"] else 1


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=8, help="texts (default 8)")
    parser.add_argument("--tokens", type=int, default=320, help="positions of a text (default 320)")
    parser.add_argument("--scored", type=int, default=512, help="completion positions in all (default 512)")
    parser.add_argument("--vocab", type=int, default=49_152, help="vocabulary (default 49152)")
    parser.add_argument("--hidden", type=int, default=576, help="width of the hidden states (default 576)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side (default 3)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.scored <= arguments.rows * (arguments.tokens - 1):
        most = arguments.rows * (arguments.tokens - 1)
        parser.error(f"--scored is {arguments.scored}: it must be from 1 to rows x (tokens - 1) = {most}")
    return arguments


def in_fresh_process(arguments: argparse.Namespace, side: str) -> dict[str, float]:
    """One measurement in a process of its own; this one stays small, since a child's peak begins at its parent's."""
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("rows", "tokens", "scored", "vocab", "hidden")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--side", side, *sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side's head forward and backward in this process."""
    # The parent must not load torch: these imports belong to the child.
    import torch

    from ncalign.model.logprobs import _CHUNK_LOGITS, _token_logprobs

    # The layer's weights come from the global generator: both sides compute the same numbers.
    generator = torch.manual_seed(0)
    head = torch.nn.Linear(arguments.hidden, arguments.vocab, bias=False)
    hidden = torch.randn(arguments.rows, arguments.tokens, arguments.hidden, generator=generator).requires_grad_()
    targets = torch.randint(arguments.vocab, (arguments.rows, arguments.tokens), generator=generator)
    # The last positions of each row, as evenly as they go.
    each, more = divmod(arguments.scored, arguments.rows)
    lengths = torch.tensor([each + (row < more) for row in range(arguments.rows)])
    mask = torch.arange(arguments.tokens) >= arguments.tokens - lengths.unsqueeze(1)

    def full() -> torch.Tensor:
        logprobs = head(hidden[:, :-1]).log_softmax(dim=-1)
        return logprobs.gather(-1, targets[:, 1:].unsqueeze(-1)).squeeze(-1)[mask[:, 1:]]

    def chunked() -> torch.Tensor:
        chunk_tokens = max(1, _CHUNK_LOGITS["cpu"] // arguments.vocab)
        return _token_logprobs(head, hidden[:, :-1][mask[:, 1:]], targets[:, 1:][mask[:, 1:]], chunk_tokens)

    # A first pass on a few numbers loads the libraries that both sides use.
    small = torch.nn.Linear(4, 4)(torch.randn(2, 4)).log_softmax(-1)
    (small.sum() + small.logsumexp(-1).sum()).backward()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory_kib("VmRSS"), time.process_time()
    total = (full() if arguments.side == "full" else chunked()).sum()
    total.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    seconds, peak = time.process_time() - started, memory_kib("VmHWM")
    checks = float(hidden.grad.norm()), float(head.weight.grad.norm())
    return {
        "peak_mib": (peak - before) / 1024,
        "cpu_seconds": seconds,
        "total": float(total.detach()),
        "hidden_gradient": checks[0],
        "weight_gradient": checks[1],
    }


def memory_kib(field: str) -> int:
    """A field of this process's memory account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def results(arguments: argparse.Namespace, measured: dict[str, list[dict[str, float]]]) -> list[dict[str, object]]:
    """Rows of benchmarks/results.json."""
    for name in ("total", "hidden_gradient", "weight_gradient"):
        ours, theirs = (measured[side][0][name] for side in ("ncalign", "full"))
        if abs(ours - theirs) > 1e-4 * abs(theirs):
            raise RuntimeError(f"the two sides computed different things: {name} is {ours} and {theirs}")
    conditions = (
        f"{arguments.rows}x{arguments.tokens} positions, {arguments.scored} of completions, vocabulary {arguments.vocab}, "
        f"hidden {arguments.hidden}, float32, forward and backward, one thread, {platform.machine()}, "
        f"{arguments.repeats} repeats"
    )

    def row(name: str, key: str, goal: float | None) -> dict[str, object]:
        value = median(run[key] for run in measured["ncalign"]) / max(median(run[key] for run in measured["full"]), 1e-9)
        pairs = [a[key] / max(b[key], 1e-9) for a, b in zip(measured["ncalign"], measured["full"], strict=True)]
        holds = None if goal is None else value <= goal
        spread = [round(min(pairs), 4), round(max(pairs), 4)]
        shown = round(value, 4)
        return {"name": name, "value": shown, "goal": goal, "holds": holds, "spread": spread, "conditions": conditions}

    return [
        row("head peak memory, ncalign / full log_softmax", "peak_mib", GOAL),
        row("head CPU seconds, ncalign / full log_softmax", "cpu_seconds", None),
    ]


def print_table(
    arguments: argparse.Namespace, measured: dict[str, list[dict[str, float]]], rows: list[dict[str, object]]
) -> None:
    """Medians of both sides, and the ratios."""
    print(rows[0]["conditions"])
    print(f"{'':10}{'peak MiB':>12}{'CPU s':>10}   peaks of {arguments.repeats} runs, MiB")
    for side in SIDES:
        peaks = [run["peak_mib"] for run in measured[side]]
        seconds = median(run["cpu_seconds"] for run in measured[side])
        print(f"{side:10}{median(peaks):12.1f}{seconds:10.2f}   {', '.join(f'{peak:.1f}' for peak in peaks)}")
    print(f"memory ratio {rows[0]['value']} (goal: at most {GOAL}): {'holds' if rows[0]['holds'] else 'DOES NOT HOLD'}")
    print(f"CPU ratio    {rows[1]['value']}")


if __name__ == "__main__":
    sys.exit(main())

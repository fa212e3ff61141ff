"""The training loop: optimizer steps over the plan's groups, with evaluation, checkpoints and metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from ncalign.core.progress import Bar, say
from ncalign.model.encoding import EncodedGroup
from ncalign.model.routing import RouterLoss
from ncalign.training.best import Best
from ncalign.training.engine import Engine, Last, Pass
from ncalign.training.last_visits import LastVisits
from ncalign.training.metrics import (
    ChosenAlarm,
    MetricMeans,
    PassResult,
    group_metrics,
    mean_implicit_reward,
    merged,
    sums_and_counts,
)
from ncalign.training.saved import Alarm, LoopState
from ncalign.training.schedule import DataPlan

Number = TypeVar("Number", int, float)
_EVALUATION_EPOCH = -1


@dataclass(frozen=True)
class Intervals:
    """Steps between actions; 0 for never."""

    logging: int
    evaluation: int
    checkpoint: int
    sample: int = 0


@dataclass
class Loop:
    """Everything a run needs while it runs.

    Attributes:
        engine: runs the method on groups.
        optimizer: over the trained parameters.
        plan: the groups of each step.
        groups: to train on.
        eval_groups: held out.
        learning_rate: of a step.
        max_grad_norm: 0 for no clipping.
        intervals: when to log, evaluate and save.
        log: takes a row of metrics.
        mismatched: for methods that measure from them, each training group's prompt with a completion of another.
        eval_mismatched: the same of the groups held out.
        reference_step: the step before which the policy is the reference still; -1 for none.
        best: compares evaluations, and stops training where they no longer improve; None: nothing does.
        keep_best: whether a checkpoint is written at each evaluation that is the best so far.
        sample: answers held-out prompts after a step, unless it has; None: nothing does.
        known: of each group, log-probs under the policy that training starts from, where they are known; none: the reference's.
        last_visits: of the groups' candidates, where the method draws by them.
        seen: sum and number of the trained groups' mean implicit rewards.
    """

    engine: Engine
    optimizer: torch.optim.Optimizer
    plan: DataPlan
    groups: Sequence[EncodedGroup]
    eval_groups: Sequence[EncodedGroup]
    learning_rate: Callable[[int], float]
    max_grad_norm: float
    intervals: Intervals
    log: Callable[[dict[str, float]], None]
    mismatched: Sequence[EncodedGroup] = ()
    eval_mismatched: Sequence[EncodedGroup] = ()
    reference_step: int = 0
    known: Sequence[Sequence[float] | None] = ()
    best: Best | None = None
    keep_best: bool = False
    sample: Callable[[int], None] | None = None
    last_visits: LastVisits | None = field(init=False, default=None)
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    alarm: ChosenAlarm = field(default_factory=ChosenAlarm)
    means: MetricMeans = field(default_factory=MetricMeans)
    last: dict[str, float] = field(default_factory=dict)
    done: int = 0
    """Steps taken."""

    def __post_init__(self) -> None:
        """Begin with what is known of the candidates."""
        if self.engine.method.reads_last_visits:
            self.last_visits = LastVisits.of(self.groups, start=self.plan.first_step, known=self.known or None)

    def run(
        self, start: int, *, save: Callable[[int, LoopState], None], ends: Callable[[int], bool] = lambda step: False
    ) -> dict[str, float]:
        """Train from a step to the plan's end.

        Args:
            start: steps taken already.
            save: writes a checkpoint after a step, with this loop's own state.
            ends: called after each step; whether training ends there, before the plan does.

        Returns:
            The metrics of the last evaluation, or those logged last where no groups are held out.
        """
        main, self.done = self.engine.accelerator.is_main_process, start
        tokens, since = 0, time.monotonic()
        with Bar("Training", self.plan.num_steps, completed=start, shown=main) as bar:
            for step in range(start, self.plan.num_steps):
                if self.stopped_early:
                    break
                grad_norm, step_tokens = self.step(step)
                tokens += step_tokens
                self.done = done = step + 1
                final = ends(done) or done == self.plan.num_steps
                if due(done, self.intervals.logging) or final:
                    seconds = time.monotonic() - since
                    self.last = {
                        "step": done,
                        "epoch": (done - self.plan.first_step) / self.plan.steps_per_epoch,
                        **self.reduced(self.means),
                        "learning_rate": self.learning_rate(step),
                        "grad_norm": grad_norm,
                        "tokens_per_second": self.total(tokens) / seconds,
                    }
                    self.log(self.last)
                    self.warn(self.last)
                    self.means, tokens, since = MetricMeans(), 0, time.monotonic()
                rate = self.last.get("tokens_per_second", 0.0)
                bar.advance(note=f"loss {self.last.get('loss', math.nan):.4f}  {rate:.0f} tok/s")
                self.look(done, save, final=final)
                if final:
                    break
        return self.end()

    def look(self, done: int, save: Callable[[int, LoopState], None], *, final: bool) -> None:
        """Evaluate, sample and save after a step, as far as they are due; after the final one the first two come at the end."""
        better = False
        if due(done, self.intervals.evaluation) and not final:
            row = self.evaluate(done)
            better = self.best is not None and self.best.observe(row)
        if self.sample is not None and due(done, self.intervals.sample) and not final:
            self.sample(done)
        if due(done, self.intervals.checkpoint) or (better and self.keep_best):
            save(done, self.state())

    def end(self) -> dict[str, float]:
        """The last evaluation and samples; returns the metrics of the evaluation, or those logged last where there is none."""
        if self.sample is not None:
            self.sample(self.done)
        if self.stopped_early:
            assert self.best is not None
            assert self.best.last is not None
            if self.engine.accelerator.is_main_process:
                say(f"Stopped after step {self.done} of {self.plan.num_steps}: {self.best.text()}")
            return self.best.last
        if not self.eval_groups:
            return self.last
        row = self.evaluate(self.plan.num_steps)
        if self.best is not None:
            self.best.observe(row)
        return row

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations no longer improve, before the plan's end."""
        return self.best is not None and self.best.exhausted and self.done < self.plan.num_steps

    def state(self) -> LoopState:
        """What a resumed run needs to log what this one would have logged; JSON values."""
        sums, counts = self.gathered(self.means)
        alarm: Alarm = {"history": self.alarm.history, "rung": self.alarm.rung}
        state: LoopState = {"sums": sums, "counts": counts, "alarm": alarm, "last": self.last, "seen": self.seen}
        if self.last_visits is not None:
            self.last_visits.exchange(self.engine.accelerator)
            state["last_visits"] = self.last_visits.state()
        if self.best is not None:
            state["best"] = self.best.state()
        return state

    def restore(self, state: LoopState) -> None:
        """Take over from :meth:`state`; the sums of all processes lie with the first one."""
        if self.engine.accelerator.is_main_process:
            self.means = MetricMeans(state["sums"], state["counts"])
        self.alarm.history, self.alarm.rung = state["alarm"]["history"], state["alarm"]["rung"]
        self.last, self.seen = state["last"], state["seen"]
        if self.last_visits is not None and "last_visits" in state:
            self.last_visits.restore(state["last_visits"])
        if self.best is not None and "best" in state:
            self.best.restore(state["best"])

    def step(self, step: int) -> tuple[float, int]:
        """One optimizer step over the step's groups; returns the gradient norm and the tokens this process ran."""
        engine, accelerator = self.engine, self.engine.accelerator
        epoch, indices = self.plan.step_groups(step)
        groups = [self.groups[index] for index in indices]
        parts, scoring = engine.passes(indices, groups), engine.scoring(groups, at_reference=step == self.reference_step)
        # Gradients are averaged over processes; each adds its groups' share of the step's mean.
        scale = accelerator.num_processes / len(indices)
        tokens, counted, names, found = 0, list[tuple[Pass, Tensor]](), list[list[str]](), list[Tensor]()
        if self.last_visits is not None:
            self.last_visits.begin(indices, accelerator)
        baseline = self.baseline([self.mismatched[index] for index in indices] if self.mismatched else ())
        for number, part in enumerate(parts):
            with engine.no_sync_but_last(number, len(parts)):
                last = None if self.last_visits is None else Last(self.last_visits, step)
                result = engine.train_pass(part, epoch=epoch, scoring=scoring, baseline=baseline, last=last)
                accelerator.backward(training_loss(result, part, engine.router) * (scale if part.counted else 0.0))
            if part.counted:
                if self.last_visits is not None:
                    self.last_visits.visit(part.indices, result.logprobs, step=step)
                metrics = group_metrics(result)
                names.append(list(metrics))
                found.append(torch.cat([sums_and_counts(metrics), mean_implicit_reward(result).unsqueeze(1)], dim=1))
                tokens += sum(
                    len(group.prompt) * len(group.completions) + group.num_tokens - len(group.prompt) for group in part.groups
                )
                counted.append((part, result.loss.detach()))
        parameters = [p for p in engine.model.parameters() if p.requires_grad]
        norm = accelerator.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        grad_norm, passes = _fetched(math.nan if norm is None else norm, found)
        for part_names, (sums, counts) in zip(names, passes, strict=True):
            self.means.add(part_names, (sums[:-1], counts[:-1]))
        if not math.isfinite(grad_norm):
            broken = [group for part, loss in counted for group in _not_finite(part, loss)]
            where = f" (groups {', '.join(map(repr, broken[:5]))})" if broken else ""
            raise ValueError(
                f"step {step + 1}: the gradient is not finite{where}. The last checkpoint and metrics are kept; lower "
                "learning_rate or max_grad_norm, or look at these groups"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if engine.method.hooks.baseline is not None:
            implicit = [sum(part[row][-1] for part in passes) for row in range(2)]
            self.seen = [before + self.total(new) for before, new in zip(self.seen, implicit, strict=True)]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, tokens

    def baseline(self, mismatched: Sequence[EncodedGroup]) -> float:
        """The level that the method measures scores from, the same for all passes and processes; 0 for methods without one."""
        if (baseline := self.engine.method.hooks.baseline) is None:
            return 0.0
        log_ratio = self.engine.mismatched_log_ratio(mismatched) if mismatched else math.nan
        seen = self.seen[0] / self.seen[1] if self.seen[1] else 0.0
        return baseline.level(self.engine.method.beta * log_ratio, seen)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics on the held-out groups; the kernel draws the same at every evaluation."""
        means, broken = MetricMeans(), []
        parts = self.engine.passes(range(len(self.eval_groups)), self.eval_groups)
        baseline = self.baseline(self.eval_mismatched)
        with Bar("Evaluating", len(parts), shown=self.engine.accelerator.is_main_process) as bar:
            for part in parts:
                result = self.engine.eval_pass(part, epoch=_EVALUATION_EPOCH, baseline=baseline)
                if part.counted:
                    metrics = group_metrics(result)
                    means.add(metrics, sums_and_counts(metrics).tolist())
                    broken += _not_finite(part, result.loss)
                bar.advance()
        if broken:
            say(f"warning: step {step}: the loss of held-out groups is not finite, and left out: {', '.join(broken[:5])}")
        row = {"step": step, **{f"eval/{name}": value for name, value in self.reduced(means).items()}}
        self.log(row)
        return row

    def warn(self, row: dict[str, float]) -> None:
        """Print the warnings that a user should act on."""
        warning = self.alarm.observe(row.get("logps/chosen_change", 0.0))
        if warning and self.engine.accelerator.is_main_process:
            say(f"warning: step {row['step']:.0f}: {warning}")

    def reduced(self, means: MetricMeans) -> dict[str, float]:
        """Means over all processes' groups."""
        return MetricMeans(*self.gathered(means)).means()

    def gathered(self, means: MetricMeans) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts over all processes' groups."""
        alone = self.engine.accelerator.num_processes == 1
        return merged([means.parts()] if alone else gather_object([means.parts()]))

    def total(self, count: Number) -> Number:
        """A number summed over processes."""
        return count if self.engine.accelerator.num_processes == 1 else sum(gather_object([count]))


def due(step: int, interval: int) -> bool:
    """Whether an action of this interval falls on this step."""
    return interval > 0 and step % interval == 0


def training_loss(result: PassResult, part: Pass, router: RouterLoss | None) -> Tensor:
    """The sum of the groups' losses, and the pass's router loss as often as it has groups: the step's is their mean."""
    loss = weighted_loss(result, part).sum()
    if router is None or result.aux_loss is None:
        return loss
    return loss + router.coefficient * len(part.groups) * result.aux_loss


def _fetched(norm: Tensor | float, found: Sequence[Tensor]) -> tuple[float, list[list[list[float]]]]:
    """The gradient norm and the ``[2, M]`` numbers of each pass, for which the host waits once."""
    # All processes put a sharded norm together, also one whose passes were all fillers.
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not found:
        return float(whole), []
    first = torch.as_tensor(whole, dtype=torch.float64, device=found[0].device).reshape(1)
    values = torch.cat([first, *(part.flatten() for part in found)]).tolist()
    passes, at = [], 1
    for part in found:
        width = part.shape[1]
        passes.append([values[at : at + width], values[at + width : at + 2 * width]])
        at += 2 * width
    return values[0], passes


def _not_finite(part: Pass, loss: Tensor) -> list[str]:
    return [group.id for group, good in zip(part.groups, loss.isfinite().tolist(), strict=True) if not good]


def weighted_loss(result: PassResult, part: Pass) -> Tensor:
    """The groups' losses, each times the weight of the candidate that is its positive, where candidates have weights."""
    if not any(group.weights for group in part.groups):
        return result.loss
    weights = [group.weights[int(k)] if group.weights else 1.0 for group, k in zip(part.groups, result.positive, strict=True)]
    return result.loss * torch.tensor(weights, dtype=result.loss.dtype, device=result.loss.device)

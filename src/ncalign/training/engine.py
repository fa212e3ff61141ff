"""One pass over a batch of groups: log-probs, kernel, objective; the same however a step is split over passes and processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ncalign.core.progress import Bar
from ncalign.model.attention import shares_prompts
from ncalign.model.batching import GroupBatch, collate, group_generator, rewards_and_mask, split_by_tokens
from ncalign.model.encoding import EncodedGroup
from ncalign.model.logprobs import LogprobModel, Scored, base_causal_model
from ncalign.model.policy import reference_mode
from ncalign.model.reference import ReferenceCache, candidate_key, missing_groups
from ncalign.model.routing import RouterLoss, load_balancing_loss
from ncalign.objectives import Method
from ncalign.objectives.estimators import (
    Draw,
    coefficients,
    difference_estimate,
    draw_candidates,
    proposal_sizes,
    reweighted,
    surrogate_loss,
)
from ncalign.objectives.kernels import pick_positive
from ncalign.objectives.mix import total
from ncalign.training.entering import acceptance, chosen, estimate, gathered, loss_inputs, moved, once, placed, read_columns
from ncalign.training.last_visits import LastVisits
from ncalign.training.metrics import NAN, PassResult
from ncalign.training.peers import put_together


@dataclass(frozen=True)
class Pass:
    """Groups that go through the model together; ``counted`` is False for a filler that keeps processes in step."""

    indices: list[int]
    groups: list[EncodedGroup]
    counted: bool


class Last(NamedTuple):
    """What a step draws by: the candidates' last visits, and the number of steps taken before it."""

    visits: LastVisits
    step: int


class Scoring(Enum):
    """Where the scores come from that a sampler or an estimator reads in training."""

    NONE = "nothing reads any"
    LAST = "each candidate's last visit, or nowhere"
    KNOWN = "the policy is the reference still, whose log-probs are in hand"
    APART = "a pass over all candidates without gradients"
    TOGETHER = "the pass with gradients, which all candidates go through"


@dataclass(frozen=True)
class Choice:
    """Which candidates of a pass's groups enter, as columns on the host; None: all.

    Attributes:
        compared: those that the loss is computed from.
        trained: those that pass through the model with gradients.
        scores: what the sampler read; None: none.
        draw: where the second stand for the first, how they were drawn.
        loss: of the first, where not all of them are known; None: it is computed.
    """

    compared: Tensor | None
    trained: Tensor | None
    scores: Tensor | None = None
    draw: Draw | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Engine:
    """Runs a method on batches of groups.

    Attributes:
        model: a :class:`LogprobModel`, as accelerate prepared it.
        method: what enters the loss, and the loss.
        accelerator: of this process.
        pad_token_id: fills the rows.
        seed: of the kernel's draws.
        max_groups: most groups in a pass.
        max_tokens: most tokens in a pass.
        token_cost: what a completion token costs, in forward passes of a prompt token: the head comes on top of the body.
        scoring_dtype: precision of the pass that scores candidates for the sampler; None: as the training's.
        prompts_once: whether that pass and the training's share the prompts, in one call of the model.
        router: the loss that balances a mixture-of-experts model's routers; None for none.
    """

    model: nn.Module
    method: Method
    accelerator: Accelerator
    pad_token_id: int
    seed: int
    max_groups: int
    max_tokens: int
    token_cost: float = 1.0
    scoring_dtype: torch.dtype | None = None
    prompts_once: bool = False
    router: RouterLoss | None = None

    @property
    def inner(self) -> LogprobModel:
        """The model without accelerate's wrappers."""
        inner = self.accelerator.unwrap_model(self.model)
        assert isinstance(inner, LogprobModel)
        return inner

    def passes(self, indices: Sequence[int], groups: Sequence[EncodedGroup], *, max_groups: int | None = None) -> list[Pass]:
        """This process's share of the groups in passes, equally many on every process (wrappers may communicate in each)."""
        share = range(self.accelerator.process_index, len(groups), self.accelerator.num_processes)
        shared = shares_prompts(base_causal_model(self.inner.model))
        sizes = [(1, groups[i].num_tokens) if shared else (len(groups[i].completions), groups[i].length) for i in share]
        split = split_by_tokens(sizes, max_groups=max_groups or self.max_groups, max_tokens=self.max_tokens, padded=not shared)
        passes = [Pass([indices[share[i]] for i in part], [groups[share[i]] for i in part], True) for part in split]
        most = max(gather_object([len(passes)])) if self.accelerator.num_processes > 1 else len(passes)
        filler = Pass([indices[0]], [groups[0]], False) if len(passes) < most else None
        return passes + [filler] * (most - len(passes)) if filler is not None else passes

    def batch(self, part: Pass) -> GroupBatch:
        """The tensors of a pass on this process's device."""
        return collate(part.groups, pad_token_id=self.pad_token_id).to(self.accelerator.device)

    def scoring(self, groups: Sequence[EncodedGroup], *, at_reference: bool) -> Scoring:
        """Choose where a step's scores come from. All processes must choose alike, so each is given all groups of the step.

        Gradients through all candidates cost `3P + 3KcT` forward passes of a token, a pass to score R of them and another
        through the chosen ones `4P + (R + 3S)cT`, or `3P + (R + 3S)cT` where they share the prompts: a group's prompt has P
        tokens, each of its K candidates T, the sampler reads R of them, S enter, and a completion token costs c.
        ``at_reference``: the policy is known to be the reference still.
        """
        sampler = self.method.sampler
        blind = self.method.estimator is not None and self.method.estimator.proposals != "current"
        if blind or (sampler is not None and sampler.last_visit):
            return Scoring.LAST
        if at_reference:
            return Scoring.KNOWN
        if not self.method.reads_scores:
            return Scoring.NONE
        size = sampler.size if sampler is not None else None
        if self.method.estimator is not None:
            size = self.method.estimator.number
        prompts = passed = 0.0
        for group in groups:
            lengths = torch.tensor([float(len(completion)) for completion in group.completions])
            number, tokens = len(lengths), float(lengths.sum())
            rewards, mask = torch.tensor([group.rewards], dtype=torch.float64), torch.ones(1, number, dtype=torch.bool)
            read = mask if sampler is None or sampler.reads is None else sampler.reads(rewards, mask)
            prompts += len(group.prompt)
            passed += 3 * tokens - float(lengths[read[0]].sum()) - 3 * tokens * min(size or number, number) / number
        cheaper = passed * self.token_cost < (0.0 if self.prompts_once else prompts)
        return Scoring.TOGETHER if cheaper else Scoring.APART

    def train_pass(
        self, part: Pass, *, epoch: int, scoring: Scoring, baseline: float = 0.0, last: Last | None = None
    ) -> PassResult:
        """Score, draw, and evaluate the objective on what was drawn, with gradients.

        The sampler's random numbers depend on ``epoch``; ``baseline`` is the level that the method measures scores from, and
        ``last`` what it draws by where scores are those of the last visit.
        """
        if scoring is Scoring.LAST and self.method.estimator is not None:
            return self._train_pass_on_proposals(part, epoch, baseline, last)
        if scoring is Scoring.LAST:
            assert last is not None
            return self._train_pass_on_last_visit(part, epoch, baseline, last)
        batch = self.batch(part)
        mask = batch.candidate_mask
        if scoring is Scoring.APART and self.prompts_once:
            return self._train_pass_on_shared_prompts(batch, part, epoch, baseline)
        trained, logprobs = None, torch.full(mask.shape, NAN, device=mask.device)
        if scoring is Scoring.KNOWN:
            logprobs = batch.reference_logprobs.float()
        elif scoring is Scoring.TOGETHER:
            trained = self._train(batch, None)
            logprobs = trained.logprobs.detach().masked_fill(~mask, NAN)
        elif scoring is Scoring.APART:
            logprobs = self.score(batch, read=self._read(part), dtype=self.scoring_dtype)
        choice = self._choose(batch, logprobs, part, epoch, baseline=baseline, estimated=trained is None)
        entered = moved(choice.trained, mask.device)
        entering = self._train(batch, choice.trained) if trained is None else chosen(trained, entered)
        logprobs = placed(logprobs.to(entering.logprobs.dtype), entering.logprobs.detach(), entered).masked_fill(~mask, NAN)
        result = self._account(batch, entering, logprobs, choice, baseline)
        if self.method.estimator is None or trained is None:
            return result
        number = (mask if entered is None else entered >= 0).sum(dim=1)
        return replace(result, estimate=estimate(number, torch.zeros_like(number), result.loss))

    def _train_pass_on_last_visit(self, part: Pass, epoch: int, baseline: float, last: Last) -> PassResult:
        """Draw by what was seen of the candidates last, and compute nothing but what was drawn."""
        # On the host, where the visits are kept: a device is not waited for.
        whole = collate(part.groups, pad_token_id=self.pad_token_id)
        batch, width = whole.to(self.accelerator.device), whole.candidate_mask.shape[1]
        mask, seen = batch.candidate_mask, last.visits.rows(part.indices, width)
        choice = self._choose(whole, seen, part, epoch, baseline=baseline, estimated=False)
        choice = replace(choice, scores=moved(choice.scores, mask.device))
        entered = moved(choice.trained, mask.device)
        entering = self._train(batch, choice.trained)
        unknown = torch.full(mask.shape, NAN, dtype=entering.logprobs.dtype, device=mask.device)
        logprobs = placed(unknown, entering.logprobs.detach(), entered).masked_fill(~mask, NAN)
        ages = last.visits.ages(part.indices, width, step=last.step).masked_fill(self._read(part) < 0, NAN).nanmean(dim=1)
        found = self._account(batch, entering, logprobs, choice, baseline)
        return replace(found, score_age=ages.to(mask.device, non_blocking=True))

    def _train_pass_on_proposals(self, part: Pass, epoch: int, baseline: float, last: Last | None) -> PassResult:
        """Draw by outdated coefficients or by nothing, and weigh what was drawn by its current coefficients."""
        whole, estimator = collate(part.groups, pad_token_id=self.pad_token_id), self.method.estimator
        assert estimator is not None
        batch, width = whole.to(self.accelerator.device), whole.candidate_mask.shape[1]
        mask = batch.candidate_mask
        # What is not drawn is taken to be as it was last, which no coefficient of those drawn depends on.
        before = whole.reference_logprobs if last is None else last.visits.rows(part.indices, width)
        generators = [group_generator(self.seed, epoch=epoch, index=index) for index in part.indices]
        compared, _ = self._select(whole, before, part, generators)
        outdated, loss = self._coefficients(before, compared, part, baseline), self._loss_of(compared, part, baseline)
        sizes = proposal_sizes(
            torch.zeros_like(outdated) if last is None else outdated, read_columns(whole.candidate_mask, compared)
        )
        counts = [len(group.completions) for group in part.groups]
        draw = draw_candidates(sizes, counts, candidates=estimator.number, generators=generators)
        entered = moved(draw.columns, mask.device)
        entering = self._train(batch, draw.columns)
        now, before = entering.logprobs.detach().cpu().double(), before.masked_fill(~whole.candidate_mask, 0.0)
        draw = reweighted(draw, coefficients(loss, placed(before, now, draw.columns)))
        choice = Choice(compared, draw.columns, None, draw, difference_estimate(loss, before, now, draw))
        unknown = torch.full(mask.shape, NAN, dtype=entering.logprobs.dtype, device=mask.device)
        logprobs = placed(unknown, entering.logprobs.detach(), entered).masked_fill(~mask, NAN)
        found = self._account(batch, entering, logprobs, choice, baseline)
        if last is None:
            return found
        ages = last.visits.ages(part.indices, width, step=last.step).nanmean(dim=1)
        return replace(found, score_age=ages.to(mask.device, non_blocking=True))

    def _train_pass_on_shared_prompts(self, batch: GroupBatch, part: Pass, epoch: int, baseline: float) -> PassResult:
        """Scores without gradients and the chosen candidates with, on the same prompts."""
        mask, choices, read = batch.candidate_mask, list[Choice](), self._read(part)
        unread = (read < 0).to(mask.device, non_blocking=True)

        def choose(logprobs: Tensor) -> Tensor:
            known = logprobs.masked_fill(unread, NAN)
            choices.append(self._choose(batch, known, part, epoch, baseline=baseline, estimated=True))
            assert choices[0].trained is not None
            return choices[0].trained

        self.model.train()
        entering: Scored = self.model(
            batch, read.tolist(), choose=choose, dtype=self.scoring_dtype, experts_per_token=self._experts_per_token
        )
        assert entering.scores is not None
        known = entering.scores.to(entering.logprobs.dtype).masked_fill(unread, NAN)
        trained = moved(choices[0].trained, mask.device)
        logprobs = placed(known, entering.logprobs.detach(), trained).masked_fill(~mask, NAN)
        return self._account(batch, entering, logprobs, choices[0], baseline)

    @torch.no_grad()
    def eval_pass(self, part: Pass, *, epoch: int, baseline: float = 0.0) -> PassResult:
        """As `train_pass`, without gradients and with the log-probs of all candidates; the loss is the whole group's."""
        batch = self.batch(part)
        self.model.eval()
        found: Scored = self.model(batch, experts_per_token=self._experts_per_token)
        logprobs = found.logprobs.masked_fill(~batch.candidate_mask, NAN)
        choice = self._choose(batch, logprobs, part, epoch, baseline=baseline, estimated=False)
        entering = chosen(found._replace(logprobs=logprobs), moved(choice.compared, logprobs.device))
        return self._account(batch, entering, logprobs, choice, baseline)

    @property
    def _experts_per_token(self) -> int | None:
        return None if self.router is None else self.router.experts_per_token

    def _train(self, batch: GroupBatch, select: Tensor | None) -> Scored:
        """Log-probs with gradients."""
        self.model.train()
        cells = None if select is None else select.tolist()
        found: Scored = self.model(batch, cells, experts_per_token=self._experts_per_token)
        return found

    def mismatched_log_ratio(self, groups: Sequence[EncodedGroup]) -> float:
        """Mean log-ratio of all processes' candidates of these groups, without gradients; NaN where there are none."""
        total, count = 0.0, 0
        for part in self.passes(range(len(groups)), groups):
            batch = self.batch(part)
            ratios = (self.score(batch) - batch.reference_logprobs)[batch.candidate_mask]
            total, count = total + part.counted * float(ratios.sum()), count + part.counted * ratios.numel()
        if self.accelerator.num_processes > 1:
            found = gather_object([(total, count)])
            total, count = sum(some for some, _ in found), sum(some for _, some in found)
        return total / count if count else NAN

    @torch.no_grad()
    def score(self, batch: GroupBatch, *, read: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Log-probs without gradients of all candidates or those in ``read``; NaN elsewhere. ``dtype``: the precision."""
        self.model.eval()
        logprobs: Tensor = self.model(batch, None if read is None else read.tolist(), dtype=dtype).logprobs
        unread = ~batch.candidate_mask if read is None else (read < 0).to(logprobs.device, non_blocking=True)
        return logprobs.masked_fill(unread, NAN)

    def _read(self, part: Pass) -> Tensor:
        """``[B, K]`` on the host, the index of each candidate whose score the sampler reads; -1 for others."""
        sampler, (rewards, mask) = self.method.sampler, rewards_and_mask(part.groups)
        read = mask if sampler is None or sampler.reads is None else sampler.reads(rewards, mask)
        return torch.arange(mask.shape[1]).expand(mask.shape).masked_fill(~read, -1)

    @torch.no_grad()
    def training_logprobs(self, batch: GroupBatch) -> Tensor:
        """Log-probs of all candidates as a training pass computes them, dropout included; NaN for absent ones."""
        self.model.train()
        logprobs: Tensor = self.model(batch).logprobs
        return logprobs.masked_fill(~batch.candidate_mask, NAN)

    def _choose(
        self, batch: GroupBatch, logprobs: Tensor, part: Pass, epoch: int, *, baseline: float, estimated: bool
    ) -> Choice:
        """What enters by the candidates' log-probs; ``estimated``: whether a method's estimator draws."""
        # Each group draws with random numbers of its own, so that the split over passes and processes changes nothing.
        generators = [group_generator(self.seed, epoch=epoch, index=index) for index in part.indices]
        compared, scores = self._select(batch, logprobs, part, generators)
        if self.method.estimator is None or not estimated:
            return Choice(compared, compared, scores)
        found = self._coefficients(logprobs, compared, part, baseline)
        sizes = [len(group.completions) for group in part.groups]
        draw = draw_candidates(found, sizes, candidates=self.method.estimator.number, generators=generators)
        return Choice(compared, draw.columns, None, draw)

    def _coefficients(self, logprobs: Tensor, compared: Tensor | None, part: Pass, baseline: float) -> Tensor:
        """What each candidate counts in the gradient of the loss of those compared, ``[B, K]``."""
        known = logprobs.detach().cpu().double().masked_fill(~rewards_and_mask(part.groups)[1], 0.0)
        return coefficients(self._loss_of(compared, part, baseline), known)

    def _loss_of(self, compared: Tensor | None, part: Pass, baseline: float) -> Callable[[Tensor], Tensor]:
        """The loss of those compared as a function of all candidates' log-probs."""
        # On the host and in float64: a few numbers, of which small differences may be what counts.
        whole, sampler = collate(part.groups, pad_token_id=self.pad_token_id), self.method.sampler
        return lambda values: self.method.loss(
            loss_inputs(gathered(values, compared), whole, sampler, compared, None, baseline)
        )

    def reference_coefficients(self, groups: Sequence[EncodedGroup]) -> Tensor:
        """What each candidate counts while the policy is the reference: float64, ``[B, K]`` on the host."""
        part, batch = Pass(list(range(len(groups))), list(groups), True), collate(groups, pad_token_id=self.pad_token_id)
        generators = [group_generator(self.seed, epoch=0, index=index) for index in part.indices]
        compared, _ = self._select(batch, batch.reference_logprobs, part, generators)
        return self._coefficients(batch.reference_logprobs, compared, part, 0.0)

    def _select(
        self, batch: GroupBatch, logprobs: Tensor, part: Pass, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The columns that the sampler chooses (None: all), on the host, and the scores that it read (None: none)."""
        sampler, (rewards, mask) = self.method.sampler, rewards_and_mask(part.groups)
        if sampler is None:
            return None, None
        scores = self.method.kernel_scores(logprobs, batch.reference_logprobs.to(logprobs.dtype))
        read = None if scores is None else scores.cpu()
        drawn = []
        for b, generator in enumerate(generators):
            # The group's own columns only: padding would change how many random numbers a draw takes.
            own = (slice(b, b + 1), slice(0, int(mask[b].sum())))
            drawn.append(sampler.select(None if read is None else read[own], rewards[own], mask[own], generator))
        # A mix's parts stay in blocks of one width.
        drawn = [choice.unflatten(1, (sampler.blocks, -1)) for choice in drawn]
        width = max(choice.shape[2] for choice in drawn)
        padded = [nn.functional.pad(choice, (0, width - choice.shape[2]), value=-1) for choice in drawn]
        return torch.cat(padded).flatten(1), scores

    def _account(self, batch: GroupBatch, entering: Scored, logprobs: Tensor, choice: Choice, baseline: float) -> PassResult:
        method, logprobs, scores = self.method, logprobs.detach(), choice.scores
        select, draw = moved(choice.compared, logprobs.device), choice.draw
        compared = entering.logprobs if draw is None else gathered(logprobs, select)
        inputs = loss_inputs(compared, batch, method.sampler, select, scores, baseline)
        shares = None if method.hooks.shares is None else method.hooks.shares(inputs)
        loss = method.loss(inputs) if shares is None else total(shares)
        if draw is not None:
            loss = loss if choice.loss is None else choice.loss.to(loss.device, loss.dtype)
            loss = surrogate_loss(loss, entering.logprobs, draw.weights.to(loss.device, loss.dtype))
        if select is not None and method.sampler is not None:
            first = select[:, : select.shape[1] // method.sampler.blocks]
            positive, negatives = first[:, 0], first[:, 1:]
            entering = once(entering, select) if draw is None and method.sampler.blocks > 1 else entering
        else:
            positive = pick_positive(batch.rewards, batch.candidate_mask, generator=None)
            candidates = torch.arange(batch.rewards.shape[1], device=positive.device).expand_as(batch.rewards)
            lower = batch.candidate_mask & (batch.rewards < batch.rewards.gather(1, positive.unsqueeze(1)))
            negatives = candidates.masked_fill(~lower, -1)
        kernel = None if method.sampler is None else method.sampler.kernel
        temperature = None if method.sampler is None else method.sampler.temperature
        read = None if scores is None else (scores, positive, batch.rewards, batch.candidate_mask)
        return PassResult(
            loss=loss,
            log_ratios=logprobs - batch.reference_logprobs.to(logprobs.dtype),
            logprobs=logprobs,
            rewards=batch.rewards,
            lengths=batch.completion_lengths,
            mask=batch.candidate_mask,
            positive=positive,
            negatives=negatives,
            kernel=None if kernel is None or read is None else kernel(*read),
            target_weights=None
            if method.hooks.target_weights is None
            else method.hooks.target_weights(batch.rewards, batch.candidate_mask),
            beta=method.beta,
            aux_loss=self._aux_loss(entering),
            shares=shares,
            temperature=None if temperature is None or read is None else temperature(*read),
            acceptance=acceptance(inputs, method) if method.sampler is not None and method.sampler.accepts else None,
            estimate=None if draw is None else estimate(draw.num_candidates, draw.relative_variance, loss),
        )

    def _aux_loss(self, entering: Scored) -> Tensor | None:
        if self.router is None:
            return None
        assert entering.expert_use is not None
        return load_balancing_loss(entering.expert_use, experts_per_token=self.router.experts_per_token)

    def logprobs(self, groups: Sequence[EncodedGroup]) -> list[tuple[float, ...]]:
        """Log-probs of every candidate of these groups under the current weights, without gradients.

        All processes call it with the same groups: each computes its share, and every one gets all.
        """
        found: dict[int, tuple[float, ...]] = {}
        for part in self.passes(range(len(groups)), groups, max_groups=len(groups)) if groups else ():
            values = self.score(self.batch(part)).double().cpu()
            for b, index in enumerate(part.indices if part.counted else ()):
                found[index] = tuple(values[b, : len(groups[index].completions)].tolist())
        return put_together(self.accelerator, found) if groups else []

    def fill_reference(self, groups: Sequence[EncodedGroup], cache: ReferenceCache) -> int:
        """Compute the reference log-probs that any process lacks, each its share; returns how many groups that were.

        Processes may look at different caches (one a node, or one that another run fills at this moment): they agree on what
        is missing first, and every cache folder ends up with all of it.
        """
        alone = self.accelerator.num_processes == 1
        lacking = missing_groups(groups, cache)
        positions = lacking if alone else sorted(set().union(*gather_object([set(lacking)])))
        missing = [groups[position] for position in positions]
        parts = self.passes(range(len(missing)), missing, max_groups=len(missing)) if missing else []
        found: dict[bytes, float] = {}
        with Bar("Reference log-probs", len(parts), shown=self.accelerator.is_main_process and bool(parts)) as bar:
            with reference_mode(self.inner.model):
                for part in parts:
                    values = self.score(self.batch(part)).double().cpu()
                    for b, group in enumerate(part.groups if part.counted else []):
                        for k in range(len(group.completions)):
                            key = candidate_key(group, k)
                            found[key] = float(values[b, k])
                            cache.add(key, found[key])
                    bar.advance()
        cache.flush()
        if missing and not alone:
            for others in gather_object([found]):
                cache.values.update(others)
            if self.accelerator.is_local_main_process:
                on_disk = ReferenceCache(cache.folder)
                for key in cache.values.keys() - on_disk.values.keys():
                    on_disk.add(key, cache.values[key])
                on_disk.flush()
        return len(missing)

    def no_sync_but_last(self, number: int, total: int) -> contextlib.AbstractContextManager[None]:
        """Gradients travel between processes once a step, in the last pass's backward.

        Not where weights are sharded: until then each process would keep the gradients of all of them.
        """
        each = number == total - 1 or isinstance(self.model, FSDPModule)
        return contextlib.nullcontext() if each else _no_sync(self.accelerator, self.model)


@contextlib.contextmanager
def _no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    with accelerator.no_sync(model):
        yield

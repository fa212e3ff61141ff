"""TRL's own losses on log-probs that a test chooses: its trainers without their constructors, around a model that is a table.

`Groups` holds the log-probs; `dpo_trainer` and `cpo_trainer` give TRL's loss of each group, `ours` that of a configured method.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from ncalign.objectives.method import LossInputs, Method

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL's imports say is not ours to mend
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

Losses = Callable[["Groups"], Tensor]


class Config(Protocol):
    def method(self) -> Method: ...


@dataclass(frozen=True)
class Groups:
    """B groups of K completions of at most T tokens.

    Attributes:
        tokens: the policy's log-prob of each token, ``[B, K, T]``; below 0, and 0 beyond a completion's end.
        reference: the reference's.
        mask: True for real tokens; they come first.
        rewards: ``[B, K]``, no two of a group alike.
    """

    tokens: Tensor
    reference: Tensor
    mask: Tensor
    rewards: Tensor

    def pairs(self, pairing: str) -> list[list[tuple[int, int]]]:
        """Of each group, the columns (chosen, rejected) that a pairing without chance makes of it."""
        made = []
        for rewards in self.rewards.tolist():
            ranked = sorted(range(len(rewards)), key=lambda column: -rewards[column])
            every = [(better, worse) for place, better in enumerate(ranked) for worse in ranked[place + 1 :]]
            of_best = every[: len(rewards) - 1]
            made.append({"best_vs_worst": of_best[-1:], "best_vs_each": of_best, "all_pairs": every}[pairing])
        return made


def random_groups(num_groups: int = 6, num_candidates: int = 4, num_tokens: int = 5, seed: int = 0) -> Groups:
    """Groups whose completions differ in length, in float64; a gradient can be taken of the policy's tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_candidates, num_tokens)
    lengths = torch.randint(1, num_tokens + 1, shape[:2], generator=generator)
    mask = torch.arange(num_tokens) < lengths.unsqueeze(-1)
    tokens, reference = (-torch.rand(shape, dtype=torch.float64, generator=generator).clamp(min=1e-3) for _ in range(2))
    rewards = torch.rand(shape[:2], dtype=torch.float64, generator=generator)
    return Groups(torch.where(mask, tokens, 0.0).requires_grad_(), torch.where(mask, reference, 0.0), mask, rewards)


def ours(config: Config, groups: Groups, seed: int = 0) -> Tensor:
    """Loss of each group by a method of ours: its sampler's choice, then its loss."""
    method = config.method()
    logprobs, reference = groups.tokens.sum(dim=2), groups.reference.sum(dim=2)
    mask = torch.ones_like(groups.rewards, dtype=torch.bool)
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    if method.sampler is not None:
        assert method.sampler.scores is None, "TRL draws no negatives by their scores"
        columns = method.sampler.select(None, groups.rewards, mask, torch.Generator().manual_seed(seed))
    taken = columns.clamp(min=0)
    values = [logprobs - reference, logprobs, groups.rewards, groups.mask.sum(dim=2).double()]
    inputs = [value.gather(1, taken) for value in values]
    return method.loss(LossInputs(*inputs, columns >= 0))


def assert_trls(config: Config, theirs: Losses, groups: Groups) -> None:
    """Our losses of these groups are TRL's, and so are their gradients in every real token."""
    values = ours(config, groups), theirs(groups)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    found, expected = (torch.autograd.grad(value.sum(), groups.tokens)[0][groups.mask] for value in values)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def dpo_trainer(
    losses: Sequence[str], *, pairing: str, beta: float, weights: Sequence[float] = (1.0,), label_smoothing: float = 0.0
) -> Losses:
    """Loss of each group by `DPOTrainer`: a batch that consists of the group's pairs."""
    settings = {
        "loss_types": list(losses),
        "loss_weights": list(weights),
        "beta": beta,
        "label_smoothing": label_smoothing,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
    }

    def loss(tokens: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        trainer, batch = _trainer(DPOTrainer, tokens, mask, settings)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference.sum(dim=1).chunk(2)
        return trainer._compute_loss(trainer.model, batch, return_outputs=False)

    return lambda groups: _each_group(loss, groups, pairing)


def cpo_trainer(
    name: str, *, pairing: str, beta: float, nll_weight: float = 0.0, gamma: float = 0.0, label_smoothing: float = 0.0
) -> Losses:
    """Loss of each group by `CPOTrainer`, which reads no reference: a batch that consists of the group's pairs."""
    settings = {
        "loss_type": name,
        "beta": beta,
        "cpo_alpha": nll_weight,
        "simpo_gamma": gamma,
        "label_smoothing": label_smoothing,
        "alpha": 0.0,  # AlphaPO's, which we don't have
        "is_encoder_decoder": False,
        "pad_token_id": 0,
    }

    def loss(tokens: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        trainer, batch = _trainer(CPOTrainer, tokens, mask, settings)
        # Two words in the vocabulary: the one that stands there, whose id is 0, and all others.
        rest = (-torch.where(mask, tokens, -1.0).expm1()).log()
        logits = torch.nn.functional.pad(torch.stack([torch.where(mask, tokens, -1.0), rest], dim=2), (0, 0, 0, 1))
        labels = torch.where(batch["completion_mask"] == 1, 0, -100)
        sides = {}
        for key, value in {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }.items():
            sides[f"chosen_{key}"], sides[f"rejected_{key}"] = value.chunk(2)
        return trainer.get_batch_loss_metrics(lambda *args, **kwargs: SimpleNamespace(logits=logits), sides)[0]

    return lambda groups: _each_group(loss, groups, pairing)


def kto_loss(
    logps: Tensor, reference: Tensor, labels: Tensor, kl_logps: Tensor, kl_reference: Tensor, *, beta: float, weights: Tensor
) -> Tensor:
    """The loss of a batch of completions of one token by `KTOTrainer`, from the log-probs of mismatched ones too."""
    settings = {
        "calculate_KL": True,
        "loss_type": "kto",
        "beta": beta,
        "desirable_weight": weights[0].item(),
        "undesirable_weight": weights[1].item(),
        "_compute_kl_logps": lambda model, batch: kl_logps,
    }
    trainer, batch = _trainer(KTOTrainer, logps.unsqueeze(1), torch.ones(len(logps), 1, dtype=torch.bool), settings)
    batch |= {"label": labels, "ref_logps": reference, "ref_KL_logps": kl_reference}
    return trainer._compute_loss(trainer.model, batch, return_outputs=False)


def _each_group(loss: Callable[[Tensor, Tensor, Tensor], Tensor], groups: Groups, pairing: str) -> Tensor:
    """A loss of a batch of pairs, the chosen completions first, for each group by itself."""
    losses = []
    for group, pairs in enumerate(groups.pairs(pairing)):
        columns = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        losses.append(loss(*(value[group, columns] for value in (groups.tokens, groups.reference, groups.mask))))
    return torch.stack(losses)


def _trainer(kind: type[Any], tokens: Tensor, mask: Tensor, settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A trainer of TRL's as its loss sees it, and a batch: one token of prompt, then the completion."""

    def model(**inputs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(tokens)
        return SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    model.training = False
    trainer = kind.__new__(kind)
    same = {"gather": lambda value: value, "gather_for_metrics": lambda value: value}
    vars(trainer).update(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), **same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **settings,
    )
    completion = torch.nn.functional.pad(mask.long(), (1, 0))
    present = torch.nn.functional.pad(mask.long(), (1, 0), value=1)
    return trainer, {"input_ids": torch.zeros_like(present), "attention_mask": present, "completion_mask": completion}

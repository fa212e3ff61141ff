"""Our objectives inside TRL's DPO trainer: the loss of a batch is TRL's own where both have it, and training runs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from ncalign import read_groups
from ncalign.objectives import dpo_loss, nca_pair_loss

PairLoss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, PairLoss] = {"sigmoid": dpo_loss, "nca_pair": nca_pair_loss}

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL's imports say is not ours to mend
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer


class OurTrainer(DPOTrainer):
    """A DPOTrainer whose loss is one of ours, from log-probs of its own."""

    pair_loss: PairLoss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        targets, scored = inputs["input_ids"][:, 1:, None], inputs["completion_mask"][:, 1:].bool()
        tokens = outputs.logits[:, :-1].float().log_softmax(dim=-1).gather(-1, targets)[..., 0]
        logprobs = torch.where(scored, tokens, 0.0).sum(dim=1)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        chosen, rejected = (self.beta * (logprobs - reference)).chunk(2)
        loss = type(self).pair_loss(chosen, rejected).mean()
        return (loss, outputs) if return_outputs else loss


@pytest.fixture
def pairs(groups_file: Path) -> Dataset:
    rows = []
    for group in read_groups(groups_file):
        ranked = sorted(group.candidates, key=lambda candidate: candidate.reward or 0.0, reverse=True)
        rows.append({"prompt": group.prompt, "chosen": ranked[0].completion, "rejected": ranked[-1].completion})
    return Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def tolerant() -> Iterator[None]:
    """TRL, datasets and accelerate warn of deprecations of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainer_of(kind: type[DPOTrainer], model: LlamaForCausalLM, folder: Path, pairs: Dataset, loss_type: str) -> DPOTrainer:
    arguments = DPOConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        beta=0.3,
        max_steps=2,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=12,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    return kind(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_trl(
    loss_type: str, tiny_model: LlamaForCausalLM, tmp_path: Path, pairs: Dataset
) -> None:
    kind = type("Trainer", (OurTrainer,), {"pair_loss": staticmethod(LOSSES[loss_type])})
    found = []
    for trainer_kind in (DPOTrainer, kind):
        trainer = trainer_of(trainer_kind, copy.deepcopy(tiny_model), tmp_path / trainer_kind.__name__, pairs, loss_type)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in trainer.model.parameters():  # away from the reference
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}, batch["input_ids"]))
    (theirs, their_gradients, their_ids), (ours, our_gradients, our_ids) = found
    assert torch.equal(their_ids, our_ids)
    reference_value = {"sigmoid": math.log(2), "nca_pair": 2 * math.log(2)}[loss_type]
    assert abs(theirs.item() - reference_value) > 1e-2, "the comparison is away from the reference"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_training_starts_at_two_log_two_and_descends(tiny_model: LlamaForCausalLM, tmp_path: Path, pairs: Dataset) -> None:
    kind = type("Trainer", (OurTrainer,), {"pair_loss": staticmethod(nca_pair_loss)})
    trainer = trainer_of(kind, tiny_model, tmp_path / "run", pairs, "sigmoid")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(12)])
    before = trainer.compute_loss(trainer.model, batch).item()
    assert before == pytest.approx(2 * math.log(2), abs=1e-4)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    assert history[0] == pytest.approx(2 * math.log(2), abs=1e-4)  # TRL logs four decimals
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() < before - 1e-3

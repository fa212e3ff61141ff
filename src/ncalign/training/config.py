"""Configuration of `ncalign train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from ncalign.core.config import Flat, Frozen, Seed
from ncalign.data.config import JoinRows, OnBadRow, SchemaChoice
from ncalign.model.config import DType, EncodingConfig, LoRA, Quantization, check_quantization
from ncalign.objectives import MCPO, ObjectiveConfig

CorruptKind: TypeAlias = Literal["swap_tokens", "truncate", "other_prompt", "flip_rewards"]


class Corrupt(Frozen):
    """Candidates or rewards of the training groups that are spoilt on purpose, to see what a method makes of it."""

    kind: CorruptKind = Field(
        description="What takes the place of a candidate that is not the best: the best one with tokens exchanged "
        "(swap_tokens), its own first half (truncate), or a completion of another prompt (other_prompt); flip_rewards turns a "
        "group's rewards round."
    )
    share: float = Field(1.0, gt=0, le=1, description="Probability with which a candidate, or a group's rewards, is spoilt.")


class TrainConfig(Frozen):
    """`ncalign train`: align a model from groups of scored candidates."""

    encoding: Annotated[EncodingConfig, Flat()] = Field(default_factory=EncodingConfig)
    model: str = Field(description="Model folder or hub id.")
    data: Path = Field(
        description="Groups to train on (a file, folder or FOLDER:SPLIT of any kind and schema that `convert` reads)."
    )
    schema_name: SchemaChoice = "auto"
    output_dir: Path = Field(description="Run folder: metrics.jsonl, config.yaml, checkpoints/, model/.")
    eval_data: Path | None = Field(None, description="Held-out groups to evaluate on.")
    eval_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the training groups held out when there is no eval_data: the nearest whole number of groups, "
        "and at least one; groups with the same prompt stay together.",
    )
    max_candidates: int | None = Field(
        None,
        ge=2,
        description="Maximum number of candidates of a training group: the best and others drawn by the seed; none: all.",
    )
    corrupt: Corrupt | None = Field(
        None, description="Spoil candidates or rewards of the training groups on purpose; never those of held-out ones."
    )
    objective: ObjectiveConfig = Field(default_factory=MCPO, description="Training method, by its name.")
    lora: LoRA | None = Field(None, description="Train a LoRA adapter instead of all weights.")
    quantization: Quantization | None = Field(
        None, description="Hold the frozen weights in 4 bits under the adapter (QLoRA); needs lora."
    )
    reference: Literal["compute", "data"] = Field(
        "compute", description="Reference log-probs: computed from the starting model (and cached), or taken from the data."
    )
    cache_dir: Path | None = Field(
        None, description="Folder in which reference log-probs are kept; default: the user's cache folder."
    )
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True
    dtype: DType = "auto"
    scoring_dtype: DType = Field(
        "auto",
        description="Precision of the pass that scores candidates for the kernel; auto: the training's, or bfloat16 where "
        "that is float32 and this machine multiplies bfloat16 faster.",
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="Weight of the loss that balances the routers of a mixture-of-experts model; none: what the model's "
        "configuration declares; 0: without it.",
    )
    learning_rate: float = Field(
        5e-6, gt=0, description="Peak learning rate. LoRA needs about 10 to 40 times that of training all weights."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning-rate schedule after the warm-up."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Fraction of the steps over which the learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, applied to matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(
        1e-8, gt=0, description="Term added to the root of AdamW's second moment, for numerical stability."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient norm above which gradients are scaled down; 0: never.")
    num_train_epochs: float = Field(1.0, gt=0, description="Number of passes over the training groups.")
    max_steps: int = Field(-1, ge=-1, description="Number of optimizer steps; -1: as many as num_train_epochs takes.")
    per_device_train_batch_size: int = Field(
        8, ge=1, description="Maximum number of groups per device in one forward and backward pass."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Number of forward and backward passes in one optimizer step."
    )
    max_tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens in one pass; a larger batch is split, but never within a group; none: "
        "2048 on a CPU, else 16384.",
    )
    share_prompts: bool = Field(
        True, description="Compute each prompt once for all its completions, where the model's architecture allows it."
    )
    head: Literal["auto", "liger", "own"] = Field(
        "auto",
        description="Code of the vocabulary head: liger (Liger's kernel, from the extra gpu), on Hopper GPUs in bfloat16; own; "
        "auto: Liger's where it applies and computes the same, else our own.",
    )
    compile_norms_and_mlps: bool = Field(
        False, description="Compile norms and MLPs (torch.compile), so that a device has fewer kernels to launch."
    )
    activation_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass to save memory; auto: where a step would not fit the device's "
        "memory without.",
    )
    seed: Seed = Field(
        0, description="Random seed of the order of the groups, the kernel's draws and the adapter's initial weights."
    )
    logging_steps: int = Field(1, ge=1, description="Number of optimizer steps between lines of metrics.jsonl.")
    eval_steps: int = Field(
        0, ge=0, description="Number of optimizer steps between evaluations; 0: only before the first step and after the last."
    )
    save_steps: int = Field(
        0, ge=0, description="Number of optimizer steps between checkpoints; 0: only the final model is saved."
    )
    save_total_limit: int = Field(2, ge=1, description="Number of checkpoints kept; older ones are deleted.")
    sample_steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps between answers to held-out prompts, which samples.jsonl and the trackers keep; "
        "they are also answered before the first step and after the last; 0: never.",
    )
    num_sample_prompts: int = Field(4, ge=1, description="Number of held-out prompts that are answered.")
    sample_max_new_tokens: int = Field(128, ge=1, description="Maximum number of tokens of these answers.")
    sample_temperature: float = Field(0.0, ge=0, description="Sampling temperature of these answers; 0: greedy.")
    metric_for_best_model: str | None = Field(
        None,
        description="Metric of evaluations by which the best one is told, with or without eval/ before it; none: loss, where "
        "load_best_model_at_end or early_stopping_patience needs one.",
    )
    greater_is_better: bool | None = Field(
        None, description="Whether more of that metric is better; none: unless its name ends in loss."
    )
    load_best_model_at_end: bool = Field(
        False, description="Save the model of the best evaluation rather than that of the last step."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Number of evaluations without improvement of that metric, one after the other, at which training stops; "
        "none: it never stops early.",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="Change of that metric up to which an evaluation counts as no improvement."
    )
    report_to: tuple[str, ...] = Field(("tensorboard",), description="accelerate's trackers; an empty list for none.")
    project: str = Field("ncalign", min_length=1, description="Project that trackers file the run under.")
    run_name: str | None = Field(None, min_length=1, description="What trackers call the run; none: by the name of output_dir.")
    resume: bool = Field(False, description="Continue from the last checkpoint in output_dir.")
    accept_changes: bool = Field(False, description="Resume although the configuration changed; the changes are shown.")
    overwrite: bool = Field(False, description="Delete what an earlier run left in output_dir and start again.")
    merge: bool = Field(
        False,
        description="Save the model with the adapter merged into its weights; always so when the run started from an adapter.",
    )
    ddp_timeout: int = Field(
        7200,
        ge=1,
        description="Seconds for which a process waits for another, such as for the first one to write the model; then the run "
        "fails.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    @model_validator(mode="after")
    def _trainable(self) -> TrainConfig:
        check_quantization(self.quantization, self.lora, self.dtype)
        if self.reference == "data" and self.corrupt is not None and self.corrupt.kind != "flip_rewards":
            raise ValueError(
                f"corrupt: {self.corrupt.kind} changes completions, and reference: data has log-probs of those that were there "
                "before: set reference: compute"
            )
        self._held_out_for()
        if self.compile_norms_and_mlps and self.quantization is not None:
            raise ValueError(
                "compile_norms_and_mlps can't be had with quantization: bitsandbytes' layers of 4 bits are not compiled; leave "
                "one of them out"
            )
        return self

    def _held_out_for(self) -> None:
        """Raise where something looks at held-out groups, or at evaluations while training, and there are none."""
        watching = [
            name
            for name, given in (
                ("sample_steps", self.sample_steps > 0),
                ("metric_for_best_model", self.metric_for_best_model is not None),
                ("load_best_model_at_end", self.load_best_model_at_end),
                ("early_stopping_patience", self.early_stopping_patience is not None),
            )
            if given
        ]
        if watching and self.eval_data is None and not self.eval_fraction:
            raise ValueError(f"{watching[0]} needs groups that are held out: set eval_data or eval_fraction")
        if watching and watching[-1] != "sample_steps" and not self.eval_steps:
            raise ValueError(
                f"{watching[-1]} needs evaluations while training, and eval_steps is 0: set eval_steps, or leave it out"
            )

    @property
    def best_metric(self) -> str | None:
        """The metric by which evaluations are compared; None where nothing asks for that."""
        if self.metric_for_best_model is None and not self.load_best_model_at_end and self.early_stopping_patience is None:
            return None
        return self.metric_for_best_model or "loss"


class PushConfig(Frozen):
    """`ncalign push`: upload a model with a card to the Hugging Face hub."""

    model: str = Field(description="Run folder, or the folder of a model or adapter.")
    repo: str = Field(description="Repository on the hub, owner/name; it is made if it is not there.")
    evaluations: tuple[Path, ...] = Field((), description="Folders that evaluate wrote, whose tables stand in the card.")
    base_model: str | None = Field(
        None, min_length=1, description="Hub id of the base model; none: what the run or the adapter began with."
    )
    private: bool = Field(True, description="Make a new repository for yourself alone; one that is there stays as it is.")
    message: str = Field("Upload a model aligned with ncalign", min_length=1, description="Message of the commit.")

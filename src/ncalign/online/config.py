"""Configuration of `ncalign online`: training's, with where candidates and rewards come from between its rounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncalign.core.config import Flat, Frozen
from ncalign.generation.config import ServerConfig
from ncalign.rewards.config import RewardConfig
from ncalign.training.config import TrainConfig

TRAIN_ALONE = (
    *("sample_steps", "num_sample_prompts", "sample_max_new_tokens", "sample_temperature"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold"),
)
"""Settings that look at held-out groups while training, where `online` has rounds for that."""


class OnlineConfig(Frozen):
    """`ncalign online`: regenerate candidates from the policy while it trains (OnMC-PO, or any method online)."""

    training: Annotated[
        TrainConfig,
        Flat(
            defaults={"resume": True},
            descriptions={
                "data": "Prompts to answer; their own scored candidates may be mixed in.",
                "eval_data": "Held-out prompts, answered greedily and scored before each round and at the end.",
                "eval_fraction": "Fraction of the prompts held out when there is no eval_data.",
                "max_candidates": "Maximum number of the data's own candidates that are mixed into a group: the best and "
                "others drawn by the seed; none: all.",
                "corrupt": "Spoil the data's own candidates that are mixed in, or their rewards, on purpose.",
                "cache_dir": "Folder for the scores of judges and reward models; default: the user's cache folder.",
                "eval_steps": "Not used: held-out prompts are evaluated before each round and at the end.",
                **dict.fromkeys(TRAIN_ALONE, "Not used: of train alone."),
                "resume": "Continue the run that output_dir holds; --no_resume refuses to, --overwrite replaces it.",
            },
        ),
    ]
    reference: Literal["fixed", "last_round", "ema"] = Field(
        "fixed",
        description="Reference policy: the starting model (fixed), the policy at the round's start (last_round), or "
        "a moving average of it (ema).",
    )
    reference_decay: float = Field(
        0.99, gt=0, lt=1, description="Decay of the moving average at each optimizer step, with reference: ema."
    )
    regenerate_every: int | None = Field(
        None, ge=1, description="Number of optimizer steps in a round; none: rounds begin as regenerate_at says."
    )
    regenerate_at: tuple[float, ...] = Field(
        (1 / 3, 2 / 3), description="Fractions of the training at which candidates are sampled again, besides at its start."
    )
    regenerate_on_drift: float | None = Field(
        None,
        gt=0,
        description="KL divergence, in nats per completion, of the policy from the one that sampled the candidates, "
        "at which a round ends early; none: never.",
    )
    drift_steps: int = Field(
        8, ge=1, description="Number of optimizer steps between measurements of that divergence, with regenerate_on_drift."
    )
    drift_prompts: int | None = Field(
        None,
        ge=0,
        description="Number of prompts kept out of training, on whose completions that divergence is measured; 0: no "
        "measurement; none: 16, or a tenth of the prompts where that is less.",
    )
    prompts_per_round: int | None = Field(
        None, ge=1, description="Number of prompts answered in a round; none: one for each group in the round's batches."
    )
    candidates: Literal["fresh", "fresh_and_offline"] = Field(
        "fresh", description="A group's candidates: new samples (fresh), or these together with the data's own scored ones."
    )
    preferred: Literal["best", "best_fresh", "best_offline"] = Field(
        "best", description="Preferred completion: the best by reward of all candidates, of the new ones, or of the data's."
    )
    on_model: Literal["none", "importance"] = Field(
        "none",
        description="importance: weigh each group with model / policy of its preferred completion, which is sampled from the "
        "policy where the theory asks for the model; they differ unless beta is 1.",
    )
    max_importance: float = Field(10.0, ge=1, description="Upper limit of the importance weights, as a multiple of their mean.")
    rewards: Annotated[RewardConfig, Flat(defaults={"reward_timeout": 300.0, "max_failed_share": 0.1})]
    generator: Literal["transformers", "server", "vllm"] = Field(
        "transformers",
        description="What samples candidates: the policy in this process, a server (section server), or vLLM in this process.",
    )
    server: ServerConfig | None = Field(None, description="The server that samples, with generator: server.")
    server_prompts: Literal["auto", "token_ids", "text"] = Field(
        "auto",
        description="How prompts reach the server: as tokens, so that it reads and writes those that training scores "
        "(token_ids, for vLLM), or as messages, to which it applies its own chat template (text); auto: token_ids unless push "
        "is none.",
    )
    push: Literal["lora", "folder", "nccl", "none"] = Field(
        "lora",
        description="How a round's weights reach a server or vLLM: as an adapter that it loads (lora), as a model folder that "
        "it reloads (folder), all of them from GPU to GPU by vLLM's weight transfer (nccl), or not at all (none).",
    )
    vllm_memory: float = Field(0.4, gt=0, le=1, description="Fraction of the GPU's memory that vLLM in this process takes.")
    num_samples: int = Field(8, ge=1, description="K, the number of new completions for each prompt.")
    max_new_tokens: int = Field(256, ge=1, description="Maximum number of tokens of a completion.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; 1 samples from the policy itself.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability; 1: off.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0: off.")
    generation_batch_size: int = Field(64, ge=1, description="Number of completions sampled at a time.")
    chunk_size: int = Field(
        64,
        ge=1,
        description="Number of prompts whose samples are written to disk together; a kill loses one such chunk at most.",
    )
    probe_tolerance: float | None = Field(
        0.05,
        gt=0,
        description="Maximum difference in nats per token between generator and policy, checked on a few samples "
        "before each round; none: no check.",
    )
    learning_rate_over: Literal["run", "round"] = Field(
        "run", description="Whether the learning-rate schedule spans the run, or starts again with each round."
    )
    learning_rate_decay: float = Field(
        1.0, gt=0, le=1, description="Factor by which the learning rate is multiplied after each round."
    )

    @model_validator(mode="after")
    def _consistent(self) -> OnlineConfig:
        if self.preferred == "best_offline" and self.candidates == "fresh":
            raise ValueError("preferred: best_offline needs candidates: fresh_and_offline")
        for name in ("max_candidates", "corrupt"):
            if self.candidates == "fresh" and getattr(self.training, name) is not None:
                raise ValueError(
                    f"{name} is for the data's own candidates, and candidates: fresh trains on new ones alone: set candidates: "
                    "fresh_and_offline, or leave it out (num_samples is the number of new ones)"
                )
        if list(self.regenerate_at) != sorted(set(self.regenerate_at)) or not all(0 < at < 1 for at in self.regenerate_at):
            raise ValueError(f"regenerate_at must rise between 0 and 1, and is {list(self.regenerate_at)}")
        if self.drift_prompts == 1:
            raise ValueError("drift_prompts must be 0 or at least 2, and is 1: an interval over prompts needs two")
        if self.regenerate_on_drift is not None and self.drift_prompts == 0:
            raise ValueError(
                "regenerate_on_drift needs prompts to measure the drift on: drift_prompts must be at least 2, and is 0"
            )
        if (self.generator == "server") != (self.server is not None):
            raise ValueError("generator: server and the section server go together: give both or neither")
        if self.generator != "transformers" and self.push == "lora" and self.training.lora is None:
            raise ValueError("push: lora needs lora; push: folder sends all weights")
        if self.push == "nccl":
            self._sends_all_weights()
        if self.generator == "vllm" and self.push == "lora" and self.training.quantization is not None:
            raise ValueError(
                "vLLM in this process holds the base model's own weights, and the policy those in 4 bits (quantization): "
                "an adapter (push: lora) would sample from another model: set push: folder, which sends dequantized weights"
            )
        for name in TRAIN_ALONE:
            if getattr(self.training, name) != TrainConfig.model_fields[name].default:
                raise ValueError(
                    f"{name} is of train, and online does without: its held-out prompts are answered and scored before each "
                    "round and at the end (rounds/*/evaluation.json)"
                )
        max_length = self.training.encoding.max_length
        if self.max_new_tokens >= max_length:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) must be less than max_length ({max_length}): prompts need room"
            )
        return self

    def _sends_all_weights(self) -> None:
        """Raise where ``push: nccl`` has nobody to send to, or the policy is an adapter, which is less to send."""
        if self.generator != "server":
            raise ValueError(
                f"push: nccl sends weights to servers, and generator is {self.generator}: "
                + ("leave push out" if self.generator == "transformers" else "set push: folder")
            )
        if self.training.lora is not None or self.training.quantization is not None:
            raise ValueError("push: nccl sends all weights as they are trained, and lora trains an adapter: set push: lora")

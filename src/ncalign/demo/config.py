"""Configuration of `ncalign demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ncalign.core.config import Frozen, Seed


class DemoConfig(Frozen):
    """`ncalign demo`: align a real small model and measure what it gained."""

    model: str | None = Field(None, description="Model folder or hub id; default: SmolLM2-135M-Instruct from its package.")
    objective: Literal["mc_po", "nca", "info_nca", "dpo"] = Field("mc_po", description="Training method.")
    output_dir: Path = Field(Path("runs/demo"), description="Run folder; an earlier demo in it is replaced.")
    online: bool = Field(False, description="Compare candidates sampled once with candidates sampled again every eight steps.")
    quick: bool = Field(False, description="A smaller demo, in under three minutes: fewer groups, steps and held-out prompts.")
    fresh: bool = Field(False, description="Sample and score the candidates again instead of using the shipped ones.")
    num_eval_prompts: int | None = Field(
        None, ge=128, description="Held-out prompts that both models answer; none: 384, with online 256, with quick 128."
    )
    seed: Seed = Field(0, description="Random seed of the training.")

    @model_validator(mode="after")
    def _quick_is_offline(self) -> DemoConfig:
        if self.quick and self.online:
            raise ValueError("quick makes the offline demo smaller; the online demo has one size: leave out one of the two")
        return self

"""Configuration of `ncalign chat`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from ncalign.core.config import Frozen, Seed
from ncalign.model.config import ChatTemplateKwargs, ControlTokensInText, DType, TemplateDate
from ncalign.rewards.config import JudgeConfig


class ChatConfig(Frozen):
    """`ncalign chat`: talk to a model, or to two at once."""

    model: str = Field(description="Model folder, hub id or run folder; an adapter folder loads its base model too.")
    against: str | None = Field(None, description="A second model, which answers the same; each goes on from its own answers.")
    system: str | None = Field(None, min_length=1, description="System prompt: the conversation's first message.")
    max_new_tokens: int = Field(512, ge=1, description="Maximum number of tokens of an answer.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability; 1: off.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0: off.")
    seed: Seed = Field(0, description="Random seed of the sampling; an answer's place in the conversation is added to it.")
    reward: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    ] = Field((), description="Where the answers' rewards come from, as for score; they are shown below the answers.")
    judge: JudgeConfig | None = Field(None, description="Language model on a server that judges, with reward: judge.")
    chat_template_kwargs: ChatTemplateKwargs = ()
    template_date: TemplateDate = None
    control_tokens_in_text: ControlTokensInText = "keep"
    dtype: DType = "auto"
    trust_remote_code: bool = Field(False, description="Run code that comes with a model.")

    @model_validator(mode="after")
    def _judged(self) -> ChatConfig:
        if self.judge is not None and not self.reward:
            raise ValueError("the section judge goes with reward: judge: give both or neither")
        return self

"""Configuration of what turns text into ids, and of the weights that are trained."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ncalign.core.config import Frozen, Overwrite
from ncalign.data.formats.messages import read_json, template_kwargs_of

Precision = Literal["float32", "bfloat16", "float64"]
"""A precision, once `auto` is decided."""

DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float64"],
    Field(
        description="Precision of the computation; auto: bfloat16 where this machine multiplies it faster than float32, else "
        "float32. Full fine-tuning keeps float32 weights and autocasts to bfloat16; with LoRA the frozen weights are held in "
        "this precision and the adapter in float32."
    ),
]


StringPrompts = Annotated[
    Literal["auto", "raw", "user_turn"],
    Field(
        description="Prompts that are plain strings: given to the model as they are (raw), as a user's turn of the chat "
        "template (user_turn), or as a user's turn where the tokenizer has a chat template and as they are elsewhere (auto)."
    ),
]


ControlTokensInText = Annotated[
    Literal["keep", "escape", "refuse"],
    Field(
        description="Texts in which control tokens such as <|im_end|> are written out: the model reads them as its own (keep), "
        "they are encoded as text (escape), or their rows are bad ones (refuse). Raw string prompts stay as they are."
    ),
]


TemplateDate = Annotated[
    date | None,
    Field(
        description="Date (YYYY-MM-DD) for chat templates that write today's; none: the day on which the run begins, which is "
        "kept for the whole of it."
    ),
]


ScoredTurns = Annotated[
    Literal["assistant", "last"],
    Field(
        description="Turns that are scored where a completion has several: all of the assistant's (assistant), or the last one "
        "alone (last). Turns of others never are."
    ),
]


Thoughts = Annotated[
    Literal["scored", "masked", "stripped"],
    Field(
        description="Thoughts such as <think>...</think> in completions: scored like the rest, read by the model and not "
        "scored (masked), or scored, and left out of all turns before the last question (stripped)."
    ),
]


def _named(values: object) -> object:
    """A mapping, as YAML files have it, as NAME=VALUE each."""
    if not isinstance(values, dict):
        return values
    return tuple(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())


def _readable(values: tuple[str, ...]) -> tuple[str, ...]:
    template_kwargs(values)
    return values


ChatTemplateKwargs = Annotated[
    tuple[str, ...],
    BeforeValidator(_named),
    AfterValidator(_readable),
    Field(
        description="Further values for the chat template, each as NAME=VALUE, such as enable_thinking=false; in a file also "
        "as a mapping. A row's own chat_template_kwargs take their place."
    ),
]


def template_kwargs(values: tuple[str, ...]) -> dict[str, Any]:
    """What NAME=VALUE says, with values in JSON where they are JSON.

    >>> template_kwargs(("enable_thinking=false", "mode=fast"))
    {'enable_thinking': False, 'mode': 'fast'}

    Raises:
        ValueError: one is no NAME=VALUE, or a name is written twice, or none that a template can be given.
    """
    found: dict[str, Any] = {}
    for one in values:
        name, equals, written = one.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{one!r}: NAME=VALUE is needed, such as enable_thinking=false")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = read_json(written)
    return template_kwargs_of(found, "chat_template_kwargs")


class LoRA(Frozen):
    """A LoRA adapter (peft); every other weight is frozen, and the reference is the adapter switched off."""

    r: int = Field(16, ge=1, description="Rank of the adapter's matrices.")
    alpha: int = Field(32, ge=1, description="Scale of the adapter: its output is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input.")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="Names of the modules that get an adapter, or 'all-linear'."
    )
    target_parameters: tuple[str, ...] = Field(
        (),
        description="Names of parameters that get an adapter and are no module's weight, as the experts of most "
        "mixture-of-experts models: mlp.experts.gate_up_proj, mlp.experts.down_proj.",
    )

    @model_validator(mode="after")
    def _no_dropout_on_parameters(self) -> LoRA:
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"dropout ({self.dropout:g}) must be 0 with target_parameters: an adapter on a parameter has no input to drop"
            )
        return self


def _number(value: object) -> object:
    """Files and flags give texts, which a choice of numbers does not read."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Quantization(Frozen):
    """Frozen weights held in 4 bits under a LoRA adapter (QLoRA, arXiv 2305.14314), by bitsandbytes."""

    bits: Annotated[Literal[4], BeforeValidator(_number)] = Field(
        4, description="Bits in which a weight of a linear layer is held."
    )
    type: Literal["nf4", "fp4"] = Field(
        "nf4", description="The 16 values that a weight can take: quantiles of a normal distribution (nf4), or floats (fp4)."
    )
    double: bool = Field(
        True, description="Quantize the scales of the blocks of 64 weights too, which saves .37 bits of a weight."
    )


def check_quantization(quantization: Quantization | None, lora: LoRA | None, dtype: str) -> None:
    """Refuse what can't be trained on weights in 4 bits.

    Raises:
        ValueError: there is no adapter, or the computation is to be in float64.
    """
    if quantization is None:
        return
    if lora is None:
        raise ValueError(
            "quantization needs lora: weights in 4 bits are frozen, since a step of the optimizer is far smaller than the "
            "distance of two of their 16 values; add lora: true, or leave quantization out to train all weights"
        )
    if dtype == "float64":
        raise ValueError("quantization computes in float32 or bfloat16, and dtype is float64: set dtype: bfloat16 or float32")


class EncodingConfig(Frozen):
    """How groups become token ids."""

    max_length: int = Field(1024, ge=2, description="Maximum number of tokens of a prompt and its completion together.")
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        description="Number of prompt tokens kept (the last ones) when prompt and longest completion exceed "
        "max_length; none: half of max_length.",
    )
    string_prompts: StringPrompts = "auto"
    control_tokens_in_text: ControlTokensInText = "keep"
    template_date: TemplateDate = None
    scored_turns: ScoredTurns = "assistant"
    thoughts: Thoughts = "scored"
    chat_template_kwargs: ChatTemplateKwargs = ()

    @model_validator(mode="after")
    def _room_for_completions(self) -> EncodingConfig:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be less than max_length ({self.max_length}): "
                "completions need room"
            )
        return self


class MergeConfig(Frozen):
    """`ncalign merge`: an adapter and its base model as one ordinary Hugging Face folder."""

    model: str = Field(description="The adapter: its folder, the folder of the run that trained it, or its hub id.")
    output: Path = Field(description="Folder to write: the merged weights, configuration, tokenizer and a model card.")
    dtype: Literal["stored", "float32", "bfloat16", "float16", "float64"] = Field(
        "stored", description="Precision of the merged weights; stored: that in which the base model's are stored."
    )
    overwrite: Overwrite = False
    trust_remote_code: bool = Field(False, description="Run code that comes with the base model.")

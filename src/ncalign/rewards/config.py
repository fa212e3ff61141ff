"""Configuration of `ncalign score`: where rewards come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ncalign.core.config import Flat, Frozen, Overwrite
from ncalign.data.config import JoinRows, OnBadRow
from ncalign.data.formats.group import MAX_NUMBER
from ncalign.generation.config import ServerConfig
from ncalign.model.config import DType, TemplateDate


class JudgeConfig(Frozen):
    """A language model on a server that scores completions."""

    server: Annotated[ServerConfig, Flat()] = Field(default_factory=ServerConfig)
    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise",
        description="pointwise: a rating for each completion; pairwise: comparisons of two completions, each in both orders.",
    )
    template: Path | None = Field(
        None,
        description="File with the judge's prompt, which holds {prompt} and {completion}, or {completion_a} and "
        "{completion_b}, and may hold {mark}; none: the bundled prompt.",
    )
    lowest: float = Field(1.0, ge=-MAX_NUMBER, le=MAX_NUMBER, description="Lowest rating that is accepted.")
    highest: float = Field(10.0, ge=-MAX_NUMBER, le=MAX_NUMBER, description="Highest rating that is accepted.")
    opponents: int | None = Field(
        None,
        ge=1,
        description="Number of other completions of its group with which each completion is compared; none: all of them.",
    )
    max_tokens: int = Field(512, ge=1, description="Maximum number of tokens of a verdict.")
    attempts: int = Field(3, ge=1, description="Number of times that a verdict is asked for until one can be read.")


class RewardConfig(Frozen):
    """Where rewards come from."""

    reward: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Field(min_length=1),
    ] = Field(
        description="Where rewards come from: 'package.module:function' or 'file.py:function', called with (prompt, "
        "completions); 'reasoning_gym', 'math_verify' or 'instructions', which read a group's metadata; 'model:FOLDER', a "
        "reward model; 'judge', the language model of section judge. Several make an ensemble.",
    )
    combine: Literal["mean", "min"] = Field("mean", description="How the rewards of several sources are combined into one.")
    judge: JudgeConfig | None = Field(None, description="Language model on a server that judges, with reward: judge.")
    reward_batch_size: int = Field(16, ge=1, description="Number of completions that a reward model scores at a time.")
    reward_timeout: float | None = Field(
        None, gt=0, description="Seconds that a function or a verifier may take for a group; none: no limit."
    )
    max_failed_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the candidates that may be left without a reward because computing it failed; 0: none.",
    )


class ScoreConfig(Frozen):
    """`ncalign score`: fill in the candidates' rewards."""

    data: Path = Field(description="Groups to score, or FOLDER:SPLIT.")
    output: Path = Field(description="Groups file to write.")
    overwrite: Overwrite = False
    rewards: Annotated[RewardConfig, Flat()]
    dtype: Annotated[
        DType,
        Field(
            description="Precision in which reward models compute; auto: bfloat16 where this machine "
            "multiplies it faster than float32, else float32."
        ),
    ] = "auto"
    cache_dir: Path | None = Field(
        None, description="Folder in which the scores of judges and reward models are kept; default: the user's cache folder."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a reward model.")
    template_date: TemplateDate = None
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True

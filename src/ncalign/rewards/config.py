"""Configuration of `ncalign score`: where rewards come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ncalign.core.config import Flat, Frozen
from ncalign.data.config import OnBadRow
from ncalign.generation.config import ServerConfig


class JudgeConfig(Frozen):
    """A language model on a server that scores completions."""

    server: Annotated[ServerConfig, Flat()] = Field(default_factory=ServerConfig)
    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise", description="A rating for each completion, or comparisons of two, each in both orders."
    )
    template: Path | None = Field(
        None,
        description="File with the judge's prompt; it holds {prompt} and {completion}, or {completion_a} and {completion_b}.",
    )
    lowest: float = Field(1.0, description="Lowest rating that counts.")
    highest: float = Field(10.0, description="Highest rating that counts.")
    opponents: int | None = Field(
        None, ge=1, description="Comparisons of a completion with others of its group; none: with all."
    )
    max_tokens: int = Field(512, ge=1, description="Of a verdict.")
    attempts: int = Field(3, ge=1, description="Times that a verdict that can't be read is asked for.")


Rewards = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(
        min_length=1,
        description="Where rewards come from: 'package.module:function' or 'file.py:function', called with (prompt, "
        "completions); 'reasoning_gym', 'math_verify' or 'instructions', which read a group's metadata; 'model:FOLDER', a "
        "reward model; 'judge', as section judge says. Several make an ensemble.",
    ),
]


Combine = Annotated[Literal["mean", "min"], Field(description="How the rewards of several sources become one.")]


Judge = Annotated[JudgeConfig | None, Field(description="The judge, with reward: judge.")]


RewardTimeout = Annotated[
    float | None, Field(gt=0, description="Seconds for a group's rewards, of a function or a verifier; none: no limit.")
]


MaxFailedShare = Annotated[
    float,
    Field(ge=0, le=1, description="Share of the candidates whose rewards may fail, each of which goes without; 0: none may."),
]


class ScoreConfig(Frozen):
    """`ncalign score`: fill in the candidates' rewards."""

    data: Path = Field(description="Groups to score.")
    output: Path = Field(description="Groups file to write.")
    reward: Rewards
    combine: Combine = "mean"
    judge: Judge = None
    reward_batch_size: int = Field(16, ge=1, description="Completions that a reward model scores at a time.")
    reward_timeout: RewardTimeout = None
    max_failed_share: MaxFailedShare = 0.0
    cache_dir: Path | None = Field(
        None, description="Where a judge's and a reward model's scores are kept; default: the user's cache folder."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a reward model.")
    on_bad_row: OnBadRow = "error"

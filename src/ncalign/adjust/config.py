"""Configuration of `ncalign adjust`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncalign.core.config import Frozen, Overwrite, Seed
from ncalign.data.config import JoinRows, OnBadRow, SchemaChoice


class AdjustConfig(Frozen):
    """`ncalign adjust`: new rewards computed from existing ones, with a record of how."""

    input: str = Field(description="Groups to read: a file, folder or hub id in any schema that `convert` reads.")
    output: Path = Field(description="Groups file to write: .jsonl, .jsonl.gz or .parquet.")
    overwrite: Overwrite = False
    steps: tuple[str, ...] = Field(
        (),
        description="Steps applied to the rewards, in this order: zscore, rank, dense_rank, quantile, "
        "clip:LOW:HIGH, scale:FACTOR, length[:UNIT], length_glm[:UNIT], aspects[:NAME=WEIGHT]...; merge says where the "
        "files of merge come in, if not before all steps.",
    )
    schema_name: SchemaChoice = "auto"
    merge: tuple[str, ...] = Field(
        (),
        description="Files with the same groups and other rewards, to combine with the input; steps before the step "
        "merge are applied to each file separately.",
    )
    merge_with: Literal["mean", "min", "max", "weights"] = Field(
        "mean", description="How the rewards of the input and the files of merge are combined into one."
    )
    merge_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="Weights for merge_with: weights: one for the input and one for each file of merge."
    )
    seed: Seed = Field(
        0, description="Random seed of the sample from which quantile works, where there are more than 2**20 rewards."
    )
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True

    @model_validator(mode="after")
    def _something_to_do(self) -> AdjustConfig:
        if not self.steps and not self.merge:
            raise ValueError("nothing to do: give steps, or files to merge, or both")
        if "merge" in self.steps and not self.merge:
            raise ValueError("steps: merge needs files to merge: give merge, or take the step out")
        if (self.merge_with == "weights") != bool(self.merge_weights):
            raise ValueError("merge_with: weights and merge_weights go together: give both or neither")
        if self.merge_weights and len(self.merge_weights) != len(self.merge) + 1:
            raise ValueError(
                f"merge_weights has {len(self.merge_weights)} numbers, and {len(self.merge) + 1} are needed: one for the input "
                "and one for each file of merge"
            )
        return self

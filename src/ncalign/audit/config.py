"""Configuration of `ncalign audit` and `ncalign check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ncalign.core.config import Flat, Frozen, Overwrite, Seed
from ncalign.data.config import DataSource, JoinRows, OnBadRow, SchemaChoice
from ncalign.model.config import DType, EncodingConfig, StringPrompts


class AuditConfig(Frozen):
    """`ncalign audit`: what a set of scored candidates is like, before anything is trained on it."""

    data: DataSource = Field(description="Scored groups: whatever `convert` reads; FOLDER:SPLIT names a split.")
    output_dir: Path = Field(Path("runs/audit"), description="Folder for audit.json and audit.html.")
    overwrite: Overwrite = False
    schema_name: SchemaChoice = "auto"
    sample: int = Field(1000, ge=2, description="Number of groups whose texts are compared, drawn evenly from all.")
    embedder: str | None = Field(
        None, description="sentence-transformers model that measures similarity of meaning; none: similarity of words alone."
    )
    bertscore: str | None = Field(
        None,
        description="Model, or model:layer, for the BERTScore between the best candidate and the others; none: not computed.",
    )
    model: str | None = Field(
        None, description="Model whose scores give the kernel's weights; none: no numbers about the kernel."
    )
    reference_model: str | None = Field(
        None, description="Reference model of the log-ratios; none: the model's log-probs alone are the scores."
    )
    beta: float = Field(0.1, gt=0, description="Scale of the log-ratio: implicit reward = beta * log(policy/reference).")
    max_length: int = Field(1024, ge=2, description="Maximum number of tokens of a prompt and its completion, for the model.")
    string_prompts: StringPrompts = "auto"
    dtype: DType = "auto"
    seed: Seed = Field(0, description="Random seed of the sample of groups.")
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True


class CheckConfig(Frozen):
    """`ncalign check`: every group encoded as training will, and a list of what to fix."""

    encoding: Annotated[EncodingConfig, Flat()] = Field(default_factory=EncodingConfig)
    data: DataSource = Field(description="Groups to check: whatever `convert` reads; FOLDER:SPLIT names a split.")
    model: str = Field(description="Model folder or hub id; only its tokenizer and configuration are read.")
    schema_name: SchemaChoice = "auto"
    join_rows: JoinRows = True
    against: DataSource | None = Field(None, description="Evaluation set; its prompts must not be among these groups'.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the tokenizer.")

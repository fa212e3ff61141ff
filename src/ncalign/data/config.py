"""Configuration of `ncalign convert`, and the types that name data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from ncalign.core.config import Frozen, Overwrite, Seed

OnBadRow = Annotated[
    Literal["error", "skip"],
    Field(description="What to do with rows that can't be used: stop with the list of them, or leave them out and count them."),
]

JoinRows = Annotated[
    bool,
    Field(
        description="Join rows with the same prompt into one group, where the schema has one completion or one pair a row; "
        "a completion that occurs in several rows gets the mean of its rewards."
    ),
]


PublicSchema: TypeAlias = Literal[
    "auto",
    "ncalign",
    "nca",
    "ultrafeedback",
    "ultrafeedback_aspects",
    "argilla",
    "distilabel",
    "nectar",
    "simpo",
    "nemo_rl",
    "lmflow",
    "solutions",
    "sharegpt",
    "alpaca",
    "nemo_aligner",
    "alpaca_eval",
    "hh",
    "trl_preference",
    "trl_unpaired",
    "openai",
    "trl_prompts",
]
Target: TypeAlias = Literal["ncalign", "best_vs_random", "best_vs_worst", "all_pairs"]
ShardKind: TypeAlias = Literal["jsonl", "jsonl.gz", "parquet"]
SchemaChoice = Annotated[
    PublicSchema,
    Field(description="Schema of the input (also --from); auto: recognised by its columns."),
]


DataSource = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A file, a folder, a saved dataset or a hub id."""


class ConvertConfig(Frozen):
    """`ncalign convert`: any schema we read → groups in JSONL or Parquet, or pairs."""

    input: DataSource = Field(
        description="File to read (.jsonl, .json, .csv, .tsv, each also with .gz, or .parquet), a folder of such files, a "
        "saved dataset, or a hub id."
    )
    output: Path = Field(
        description="File to write: .jsonl, .jsonl.gz or .parquet; any other name is a folder, with one file for "
        "each file that is read."
    )
    shards: ShardKind = Field("jsonl", description="Format of the files in an output folder.")
    schema_name: SchemaChoice = "auto"
    adapter: str | None = Field(
        None,
        description="'file.py:function' that turns a row into one of our schema, or returns None to leave it out; "
        "its code is run.",
    )
    target: Target = Field("ncalign", description="What to write (also --to): groups, or TRL's preference pairs made of them.")
    seed: Seed = Field(0, description="Random seed of the candidates drawn for best_vs_random.")
    overwrite: Overwrite = False
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True

"""Configuration of `ncalign view`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ncalign.core.config import Frozen, Overwrite
from ncalign.data.config import DataSource, JoinRows, OnBadRow, SchemaChoice


class ViewConfig(Frozen):
    """`ncalign view`: read, filter and search groups of candidates in a browser."""

    data: DataSource = Field(description="Groups: whatever `convert` reads; or the folder of a `train` or `online` run.")
    output: Path = Field(Path("view.html"), description="Page to write, where no server is started.")
    overwrite: Overwrite = False
    serve: Literal["auto"] | bool = Field(
        "auto",
        description="Start a read-only server for this machine alone, in place of writing a page; auto: above 2,000 groups.",
    )
    port: int = Field(0, ge=0, le=65535, description="Port of the server; 0: any that is free.")
    round: int | None = Field(None, ge=1, description="Round of an online run; default: the last one that has candidates.")
    beta: float | None = Field(
        None, gt=0, description="Scale of the kernel's scores: weight = softmax(beta * score); default: the run's, or 0.1."
    )
    schema_name: SchemaChoice = "auto"
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True
    cache_dir: Path | None = Field(None, description="Where the index of large data is kept; default: the user's cache folder.")

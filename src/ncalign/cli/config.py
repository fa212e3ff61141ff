"""Configurations of the verbs about ncalign itself and about what it left: `doctor`, `completion` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ncalign.core.config import Frozen, Overwrite


class DoctorConfig(Frozen):
    """`ncalign doctor`: what is installed, what this machine has, and what ncalign makes of it."""


class CompletionConfig(Frozen):
    """`ncalign completion`: the script with which a shell completes verbs, flags and their values."""

    shell: Literal["bash", "zsh", "fish"] = Field(description="The shell that is to read the script.")


class ReportConfig(Frozen):
    """`ncalign report`: the page of a run, or one of several runs."""

    runs: tuple[Path, ...] = Field(
        min_length=1, description="Folders of train, online, evaluate, audit, study or demo; several are laid over each other."
    )
    output: Path | None = Field(
        None, description="File to write; default: of one run the page in its folder, of several report.html in this folder."
    )
    overwrite: Overwrite = False

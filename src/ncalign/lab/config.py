"""Configuration of `ncalign lab`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ncalign.core.config import Frozen, Overwrite


class LabConfig(Frozen):
    """`ncalign lab`: check the theory on policies small enough to enumerate."""

    experiment: Literal["theory"] = Field("theory", description="What to run; theory: check each statement of the two papers.")
    output_dir: Path | None = Field(None, description="Folder for theory.json, the plots and theory.html; none: only print.")
    overwrite: Overwrite = False

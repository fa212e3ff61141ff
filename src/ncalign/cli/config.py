"""Configurations of the verbs that are about ncalign itself: `doctor` and `completion`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ncalign.core.config import Frozen


class DoctorConfig(Frozen):
    """`ncalign doctor`: what is installed, what this machine has, and what ncalign makes of it."""


class CompletionConfig(Frozen):
    """`ncalign completion`: the script with which a shell completes verbs, flags and their values."""

    shell: Literal["bash", "zsh", "fish"] = Field(description="The shell that is to read the script.")

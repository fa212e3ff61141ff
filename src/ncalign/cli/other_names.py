"""Names that TRL, LLaMA-Factory and others give to settings and verbs, and what these are here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from ncalign.core.config import Frozen


class Entry(Frozen):
    """What a setting of another trainer is here: a setting of ours, nothing to set, or nothing that can be had."""

    use: tuple[str, ...] = Field((), description="Settings, 'field' or 'field: value'; the first that the verb has is meant.")
    verb: str = Field("train", description="The verb that has them, for whoever asks another verb.")
    values: dict[str, Entry] = Field(default_factory=dict, description="Answers to particular values.")
    note: str = Field("", description="What differs.")
    skip: str = Field("", description="Why there is nothing to set.")
    lacks: str = Field("", description="Why it can't be had.")
    part: str = Field("", description="Which part of a mix it is, where it is no method by itself.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, written: Any) -> Any:
        return {"use": written} if isinstance(written, str) else written

    @field_validator("use", mode="before")
    @classmethod
    def _one_or_several(cls, written: Any) -> Any:
        return (written,) if isinstance(written, str) else written

    @field_validator("values", mode="before")
    @classmethod
    def _spread(cls, written: Mapping[str, Any]) -> Any:
        return dict(_one_by_one(written))

    @model_validator(mode="after")
    def _one_answer(self) -> Entry:
        if sum(map(bool, (self.use, self.skip, self.lacks))) != 1:
            raise ValueError("an entry has one of use, skip and lacks")
        return self


@dataclass(frozen=True)
class Answer:
    """What to say about a name of another trainer, and the field of ours that it stands for ('' for none)."""

    text: str
    field: str = ""


def _one_by_one(written: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Take apart names that share an answer: ``a, b``."""
    for names, value in written.items():
        for name in names.split(", "):
            yield name, value


@cache
def tables() -> dict[str, dict[str, Entry]]:
    """Every table of the file by its title: names, several in one key where they share an answer, and their entries."""
    written = yaml.safe_load((files("ncalign.cli") / "other_names.yaml").read_text(encoding="utf-8"))
    return {
        title: {names: Entry.model_validate(entry) for names, entry in rows.items()}
        for title, rows in written["settings"].items()
    }


@cache
def verbs() -> dict[str, str]:
    """Verbs of other trainers, and what to type after ``ncalign`` instead."""
    written = yaml.safe_load((files("ncalign.cli") / "other_names.yaml").read_text(encoding="utf-8"))
    return dict(_one_by_one(written["verbs"]))


@cache
def entries() -> dict[str, Entry]:
    """The entry of each name; the first table that has a name decides."""
    found: dict[str, Entry] = {}
    for rows in tables().values():
        for name, entry in _one_by_one(rows):
            found.setdefault(name, entry)
    return found


def answer(name: str, value: str, fields: Collection[str], *, flag: bool) -> Answer | None:
    """Say what a setting of another trainer is here.

    Args:
        name: as it was written; dashes count as underscores, and ``no_`` before it switches it off.
        value: the text that was given for it; empty for none.
        fields: dotted names of the verb's own fields.
        flag: whether settings are shown as flags, or as lines of a YAML file.

    Returns:
        None for a name that no table has.

    Example:
        >>> answer("bf16", "", ["dtype"], flag=True)
        Answer(text="did you mean '--dtype bfloat16'?", field='dtype')
        >>> answer("num_generations", "4", ["dtype"], flag=False).text
        "'ncalign online' takes it as 'num_samples' (K; also of 'generate')"
    """
    name = name.replace("-", "_").lower()
    if name not in entries() and name.startswith("no_"):
        name, value = name.removeprefix("no_"), "false"
    entry = entries().get(name)
    if entry is None:
        return None
    entry = _of_value(entry, value.lower())
    setting = next((use for use in entry.use if use.partition(":")[0] in fields), None)
    if setting is not None:
        return Answer(f"did you mean '{_shown(setting, flag)}'?{_plain(entry.note)}", setting.partition(":")[0])
    same = next((known for known in fields if known.rpartition(".")[2] == name), None)
    if same is not None:
        return Answer(f"did you mean '{_shown(same, flag)}'?", same)
    if entry.use:
        return Answer(f"'ncalign {entry.verb}' takes it as '{_shown(entry.use[0], flag)}'{_plain(entry.note)}")
    if entry.skip:
        return Answer(f"leave it out{_plain(entry.skip)}")
    return Answer(f"there is no such setting here{_plain(entry.lacks)}")


def _of_value(entry: Entry, value: str) -> Entry:
    """The answer to a value of a setting, or to several losses as the parts of one mix."""
    if value in entry.values or "," not in value:
        return entry.values.get(value, entry)
    parts = []
    for loss in value.split(","):
        known = entry.values.get(loss.strip())
        if known is None or not (known.part or known.use):
            return known or entry
        parts.append(known.part or known.use[0].removeprefix("objective: "))
    note = f"with `objective.parts` {','.join(parts)}, and loss_weights as `objective.weights`"
    return Entry(use=("objective: mix",), note=note)


def method(name: str) -> Answer | None:
    """Say which method another trainer's loss is; None for a name that isn't one."""
    return answer("loss_type", name, ["objective"], flag=False) if name in entries()["loss_type"].values else None


def _shown(setting: str, flag: bool) -> str:
    return "--" + setting.replace(":", "") if flag else setting


def _plain(remark: str) -> str:
    """Put a remark of the table behind a message; what is code there is in quotation marks here."""
    return f" ({remark})".replace("`", "'") if remark else ""

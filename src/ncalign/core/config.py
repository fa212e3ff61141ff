"""What configuration models share: their base, and configurations inside others that are written without a section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.fields import FieldInfo

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""torch's generators take 64 bits, one of them for the sign."""

Overwrite = Annotated[bool, Field(description="Replace what an earlier call wrote to the output.")]


@dataclass(frozen=True)
class Flat:
    """Marks a field that holds a configuration: its fields are written beside the others, without a section of their own.

    Such a field stands before the model's own fields, and a field of the model with the same name takes its place.

    Attributes:
        defaults: defaults that differ from the held configuration's own.
        descriptions: descriptions that differ.
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)


def _parts(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], Flat]]:
    for name, info in model.model_fields.items():
        for mark in info.metadata:
            if isinstance(mark, Flat):
                assert isinstance(info.annotation, type)
                yield name, info.annotation, mark


@cache
def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a configuration as its user writes them: those of `Flat` parts among them."""
    found: dict[str, FieldInfo] = {}
    parts = {name: (part, mark) for name, part, mark in _parts(model)}
    for name, info in model.model_fields.items():
        if name not in parts:
            found[name] = info
            continue
        part, mark = parts[name]
        for inner, inner_info in fields(part).items():
            found[inner] = copy(inner_info)
            found[inner].default = mark.defaults.get(inner, inner_info.default)
            found[inner].description = mark.descriptions.get(inner, inner_info.description)
    return found


class Frozen(BaseModel):
    """Base of every configuration model: immutable, and unknown keys are errors; reads and writes `Flat` parts flat."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _gather_parts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        gathered = dict(values)
        for name, part, mark in _parts(cls):
            if name not in gathered:
                own = gathered.keys() & (fields(part).keys() - cls.model_fields.keys())
                gathered[name] = {**mark.defaults, **{inner: gathered.pop(inner) for inner in own}}
        return gathered

    @model_serializer(mode="wrap")
    def _spread_parts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        parts = {name for name, _, _ in _parts(type(self))}
        spread: dict[str, Any] = {}
        for name, value in dump(self).items():
            spread.update(value if name in parts else {name: value})
        return spread

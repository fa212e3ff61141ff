"""Dropout and other chance in a model's training mode, switched off whatever its implementation calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

# dropout, resid_pdrop, layerdrop, drop_path_rate, hidden_dropout_prob; a router's jitter multiplies by random numbers too.
_CHANCE = re.compile(r"drop|jitter", re.IGNORECASE)


@dataclass(frozen=True)
class Stated:
    """A probability that a model's configuration states, and where."""

    config: PreTrainedConfig | dict[str, object]
    name: str
    value: float

    def put(self, value: float) -> None:
        """Write another value in its place."""
        if isinstance(self.config, dict):
            self.config[self.name] = value
        else:
            setattr(self.config, self.name, value)


def disable_dropout(model: torch.nn.Module) -> tuple[Stated, ...]:
    """Set every dropout of the model to 0: log-ratios between two noisy passes would not start at 0.

    Layers hold the probability as a module, as a number of their own, or look it up in the configuration at every pass: all
    three are set.

    Returns:
        What the configuration stated; :func:`as_stated` puts it back while the model is saved.
    """
    configs: dict[int, object] = {}
    for module in model.modules():
        is_dropout = _CHANCE.search(type(module).__name__) is not None
        for name, value in list(vars(module).items()):
            if _is_probability(value) and (_CHANCE.search(name) or (is_dropout and name in ("p", "prob"))):
                setattr(module, name, 0.0)
        configs |= {id(value): value for value in vars(module).values() if isinstance(value, PreTrainedConfig)}
    seen: set[int] = set()
    stated = tuple(found for config in configs.values() for found in _stated(config, seen))
    for found in stated:
        found.put(0.0)
    return stated


@contextmanager
def as_stated(stated: Sequence[Stated]) -> Iterator[None]:
    """Inside, the configuration says again what it said before :func:`disable_dropout`."""
    for found in stated:
        found.put(found.value)
    try:
        yield
    finally:
        for found in stated:
            found.put(0.0)


def _stated(config: object, seen: set[int]) -> Iterator[Stated]:
    """The probabilities of a configuration and of those inside it."""
    if not isinstance(config, PreTrainedConfig | dict) or id(config) in seen:
        return
    seen.add(id(config))
    for name, value in list((config if isinstance(config, dict) else vars(config)).items()):
        if isinstance(name, str) and _CHANCE.search(name) and _is_probability(value):
            yield Stated(config, name, value)
        else:
            yield from _stated(value, seen)


def _is_probability(value: object) -> bool:
    return isinstance(value, float) and 0.0 < value <= 1.0

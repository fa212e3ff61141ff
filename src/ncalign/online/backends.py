"""Who samples a round's completions, and how the round's weights reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from ncalign.generation import Generator, TransformersGenerator
from ncalign.online_config import OnlineConfig
from ncalign.policy import Policy
from ncalign.training.engine import Engine


class GeneratorOf(Protocol):
    """A generator that follows the policy."""

    def update(self, folder: Path) -> None:
        """Give the generator the policy's weights of now; ``folder`` is where they may be written."""
        ...

    def get(self) -> Generator:
        """The generator, as last updated."""
        ...


class InProcess:
    """The policy itself samples: there is nothing to hand over.

    Args:
        config: of the run.
        policy: model and tokenizer.
        engine: holds the model that is trained.
    """

    def __init__(self, config: OnlineConfig, policy: Policy, engine: Engine) -> None:
        """See the class."""
        self._model = policy.model
        self._generator = TransformersGenerator(
            policy.model,
            policy.tokenizer,
            string_prompts=config.string_prompts,
            batch_size=config.generation_batch_size,
            autocast=torch.bfloat16 if config.dtype == "bfloat16" else None,
            progress=False,
        )

    def update(self, folder: Path) -> None:
        """Nothing to do."""

    def get(self) -> Generator:
        """The policy, in evaluation mode."""
        self._model.eval()
        return self._generator


def make_generator(config: OnlineConfig, policy: Policy, engine: Engine) -> GeneratorOf:
    """The generator that the configuration names."""
    return InProcess(config, policy, engine)

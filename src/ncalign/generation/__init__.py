"""Sampling candidate completions: what a generator is, and the one that runs a transformers model in this process."""

from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.generation.base import Completion, Generator, SamplingParams
    from ncalign.generation.generate import SampleCounts, completion_as_candidate, run_generate, sample_groups
    from ncalign.generation.local import TransformersGenerator
    from ncalign.generation.remote import ServerGenerator

__all__ = [
    "Completion",
    "Generator",
    "SampleCounts",
    "SamplingParams",
    "ServerGenerator",
    "TransformersGenerator",
    "completion_as_candidate",
    "run_generate",
    "sample_groups",
]

__getattr__ = importer(
    __name__,
    {
        "Completion": "ncalign.generation.base",
        "Generator": "ncalign.generation.base",
        "SampleCounts": "ncalign.generation.generate",
        "SamplingParams": "ncalign.generation.base",
        "ServerGenerator": "ncalign.generation.remote",
        "TransformersGenerator": "ncalign.generation.local",
        "completion_as_candidate": "ncalign.generation.generate",
        "run_generate": "ncalign.generation.generate",
        "sample_groups": "ncalign.generation.generate",
    },
)

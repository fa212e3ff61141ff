"""Sampling candidate completions: what a generator is, and the one that runs a transformers model in this process."""

from ncalign.generation.base import Completion, Generator, SamplingParams
from ncalign.generation.local import TransformersGenerator
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.run import SampleCounts, completion_as_candidate, run_generate, sample_groups

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

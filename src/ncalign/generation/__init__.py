"""Sampling candidate completions: the `Generator` protocol, and transformers, servers and vLLM behind it."""

from ncalign.core.lazy import importer

__getattr__ = importer(
    __name__,
    base="Completion Generator SamplingParams",
    generate="SampleCounts completion_as_candidate run_generate sample_groups",
    remote="ServerGenerator",
    local="TransformersGenerator",
)

"""The public name of :mod:`ncalign.objectives.kernels`: which candidates enter a loss."""

from ncalign.objectives.kernels import (
    Kernel,
    KernelSettings,
    build_kernel,
    effective_sample_size,
    eligible_negatives,
    importance_log_weights,
    kernel_entropy,
    kernel_probabilities,
    pick_positive,
    sample_negatives,
    transition_matrix,
)

__all__ = [
    "Kernel",
    "KernelSettings",
    "build_kernel",
    "effective_sample_size",
    "eligible_negatives",
    "importance_log_weights",
    "kernel_entropy",
    "kernel_probabilities",
    "pick_positive",
    "sample_negatives",
    "transition_matrix",
]

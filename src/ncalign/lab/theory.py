"""All experiments in turn, and the files that they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ncalign.core.atomic import atomic_path, check_writable, write_json_atomic, write_text_atomic
from ncalign.core.outputs import claim, renew
from ncalign.core.progress import Bar
from ncalign.lab import concepts, estimators, fixed_points, identities, mismatch, normalizer, online, optima
from ncalign.lab.report import page, plot, table
from ncalign.lab.results import Curve, Findings, Statement

EXPERIMENTS: tuple[Callable[[], Findings], ...] = (
    identities.rnce_is_dpo,
    identities.rnce_is_one_hot_info_nca,
    identities.info_nca_of_two_is_smoothed_dpo,
    identities.limits_of_two,
    identities.values_at_the_reference,
    identities.gradient_coefficients,
    identities.invariances,
    identities.ties,
    concepts.normalizer_estimate,
    normalizer.proposition_3_3,
    normalizer.bias_and_variance,
    fixed_points.consistency,
    fixed_points.rnce_recovers_the_data,
    concepts.temperature_of_the_kernel,
    fixed_points.kernel_is_reversible,
    fixed_points.accepted_proposals,
    fixed_points.chain_bias,
    mismatch.random_starts,
    mismatch.drift,
    mismatch.coverage,
    estimators.coefficient_sampling,
    estimators.rnce_of_two,
    estimators.several_negatives,
    estimators.held_sample_size,
    estimators.last_visits,
    optima.info_nca_optimum,
    optima.info_nca_depends_on_alpha_times_beta,
    concepts.optimal_policies,
    optima.nca_optimum_with_true_normalizer,
    optima.nca_optimum_of_a_group,
    optima.nca_ceiling,
    optima.nca_never_lowers_the_best,
    optima.pair_cap,
    optima.limits_of_alpha,
    online.pair_gradient,
    online.beta_mismatch,
    online.best_of_n,
    online.displacement,
    online.single_steps_of_nca,
)

CURVES = (
    "normalizer_variance",
    "normalizer_bias",
    "fisher_consistency",
    "cd_bias",
    "drift",
    "nca_ceiling",
    "pair_gradient",
    "beta_mismatch",
    "best_of_n",
    "displacement",
    "kernel_temperature",
    "normalizer_estimate",
    "optimal_policies",
)
ENTRIES = ("theory.json", "theory.html", *(f"{name}.png" for name in CURVES))
"""What is left in the folder."""


def run_lab(output_dir: Path | None, *, overwrite: bool = False) -> dict[str, object]:
    """Check each statement of the theory on policies small enough to enumerate.

    Args:
        output_dir: Folder for ``theory.json`` (the statements), a PNG for each curve and ``theory.html`` with all of it. Each
            is written whole or not at all, once every experiment is done. None: nothing is written.
        overwrite: whether those of an earlier call are replaced.

    Returns:
        ``statements``, a dict each as `Statement.row` gives it; ``text``, a table for people; ``files``, the paths written. No
        number is random: two runs on one machine give the same.

    Raises:
        OSError: The folder can't be written; raised before the experiments begin.
        ValueError: It holds an earlier call's results, or files of these names that are not ours.
    """
    if output_dir is not None:
        own = () if (output_dir / ENTRIES[0]).exists() else ENTRIES
        claim(output_dir, ENTRIES, verb="lab", inputs={}, overwrite=overwrite, own=own)
        check_writable(output_dir / "theory.json")
    statements: list[Statement] = []
    curves: list[Curve] = []
    with Bar("theory", len(EXPERIMENTS)) as bar:
        for experiment in EXPERIMENTS:
            findings = experiment()
            statements += findings.statements
            curves += findings.curves
            bar.advance(note=experiment.__name__.replace("_", " "))
    files = [] if output_dir is None else _write(output_dir, statements, curves)
    text = "\n".join([table(statements), *(f"written: {file}" for file in files)])
    return {"statements": [statement.row() for statement in statements], "text": text, "files": files}


def _write(folder: Path, statements: Sequence[Statement], curves: Sequence[Curve]) -> list[str]:
    """Write the files and return their paths; the statements last: without them, an earlier call was stopped."""
    images = {curve.name: plot(curve) for curve in curves}
    written = [folder / "theory.json", *(folder / f"{name}.png" for name in images), folder / "theory.html"]
    renew(folder, [path.name for path in written], verb="lab")
    for name, image in images.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    write_text_atomic(page(statements, curves), written[-1])
    write_json_atomic([statement.row() for statement in statements], written[0])
    return [str(path) for path in written]

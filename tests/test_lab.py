"""The laboratory: every statement holds, a wrong one is found out, and what is written is whole and escaped."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ncalign.lab import concepts, fixed_points, identities, normalizer, online, optima, policies, report
from ncalign.lab import theory as run
from ncalign.lab.results import Curve, Findings, Statement, fitted_exponent, furthest
from ncalign.lab.theory import run_lab
from ncalign.objectives import info_nca_loss, linear_contrast_loss, nca_loss, rnce_loss
from ncalign.objectives.kernels import kernel_probabilities

KEYS = ["statement", "source", "predicted", "measured", "tolerance", "holds"]
CURVES = [
    "normalizer_estimate",
    "normalizer_bias",
    "normalizer_variance",
    "fisher_consistency",
    "kernel_temperature",
    "cd_bias",
    "drift",
    "optimal_policies",
    "nca_ceiling",
    "pair_gradient",
    "beta_mismatch",
    "best_of_n",
    "displacement",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lab") / "theory"
    return folder, run_lab(folder)


def only(*statements: Statement, curves: tuple[Curve, ...] = ()) -> tuple[Callable[[], Findings], ...]:
    def experiment() -> Findings:
        return Findings("", list(statements), list(curves))

    return (experiment,)


WRONG = Statement("2 is 3", "<nowhere>", 3.0, 2.0, 0.5)


def test_every_statement_holds(whole: tuple[Path, dict[str, Any]]) -> None:
    rows = whole[1]["statements"]
    assert len(rows) > 90
    assert [row for row in rows if not row["holds"]] == []
    assert all(abs(row["measured"] - row["predicted"]) <= row["tolerance"] for row in rows)
    assert len({row["statement"] for row in rows}) == len(rows)


def test_keys_of_a_row_and_of_the_result(whole: tuple[Path, dict[str, Any]]) -> None:
    result = whole[1]
    assert list(result) == ["statements", "text", "files"]
    assert all(list(row) == KEYS for row in result["statements"])
    assert f"{len(result['statements'])} of {len(result['statements'])} statements hold" in result["text"]
    json.dumps(result, allow_nan=False)


def test_files(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    names = ["theory.json", *(f"{name}.png" for name in CURVES), "theory.html"]
    assert result["files"] == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted([".ncalign", *names])
    # What is protected before the experiments have run.
    assert sorted(run.ENTRIES) == sorted(names)
    assert json.loads((folder / "theory.json").read_text(encoding="utf-8")) == result["statements"]
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in CURVES)
    page = (folder / "theory.html").read_text(encoding="utf-8")
    assert page.count('<figure class="chart">') == len(CURVES)
    assert page.count('<tr class="yes">') == len(result["statements"])
    assert not any(outside in page.replace("http://www.w3.org/2000/svg", "") for outside in ("http://", "https://", "<link"))


@pytest.mark.parametrize("experiment", [normalizer.proposition_3_3, online.displacement, fixed_points.chain_bias])
def test_an_experiment_gives_the_same_numbers_again(experiment: Callable[[], Findings]) -> None:
    assert experiment() == experiment()


def test_a_statement_that_does_not_hold_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = Statement("2 is 2", "arithmetic", 2.0, 2.0, 0.0)
    monkeypatch.setattr(run, "EXPERIMENTS", only(right, WRONG))
    result = run_lab(tmp_path)
    assert [row["holds"] for row in result["statements"]] == [True, False]
    assert "DOES NOT HOLD" in result["text"]
    assert "1 of 2 statements hold" in result["text"]
    assert (tmp_path / "theory.html").read_text(encoding="utf-8").count('<tr class="no">') == 1


def test_a_measurement_that_is_no_number_does_not_hold() -> None:
    for measured in (math.nan, math.inf):
        row = Statement("", "", 0.0, measured, 1.0).row()
        assert (row["measured"], row["holds"]) == (None, False)
    assert math.isnan(furthest(torch.tensor([0.0, math.nan, 9.0]), 0.0))


def test_the_page_escapes_every_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nasty = "<script>&\"'"
    curve = Curve("c", nasty, nasty, nasty, {nasty: [(0.0, 1.0), (1.0, -1.0)]}, note=nasty)
    monkeypatch.setattr(run, "EXPERIMENTS", only(Statement(nasty, nasty, 0.0, 0.0, 0.0), curves=(curve,)))
    run_lab(tmp_path)
    page = (tmp_path / "theory.html").read_text(encoding="utf-8")
    assert re.findall("<script[^>]*>", page) == ['<script type="application/json">', "<script>"]
    # The statement, its source, the curve's heading and its note.
    assert page.count("&lt;script&gt;&amp;&#34;&#39;") == 4


def test_a_logarithmic_plot_leaves_out_what_it_cannot_show() -> None:
    curve = Curve("c", "t", "x", "y", {"none": [(0.0, 0.0)], "some": [(0.0, 1.0), (1.0, 0.0), (2.0, 3.0)]}, log="xy")
    assert report.plot(curve).startswith(b"\x89PNG")


def test_without_a_folder_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "EXPERIMENTS", only(WRONG))
    assert run_lab(None)["files"] == []
    assert list(tmp_path.iterdir()) == []
    assert "theory: 1/1" in capsys.readouterr().err


def test_stopped_halfway_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped() -> Findings:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "EXPERIMENTS", (*only(WRONG), stopped))
    with pytest.raises(KeyboardInterrupt):
        run_lab(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never() -> Findings:
        raise AssertionError("the experiments began")

    monkeypatch.setattr(run, "EXPERIMENTS", (never,))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't write"):
        run_lab(tmp_path / "file")


# --- Wrong losses and kernels are found out ----------------------------------------------------------------------------


def tempered_rnce(r: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    return rnce_loss(1.01 * r, positive, mask)


def half_info_nca(r: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    return info_nca_loss(r, rewards / 2, mask, alpha=alpha)


def half_nca(r: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    return nca_loss(r, rewards / 2, mask, alpha=alpha)


@pytest.mark.parametrize(
    ("module", "name", "replacement", "experiment"),
    [
        (identities, "rnce_loss", tempered_rnce, identities.rnce_is_dpo),
        (policies, "nca_loss", half_nca, identities.gradient_coefficients),
        (policies, "firsts", lambda values: torch.ones(values.shape[0], dtype=torch.long), normalizer.proposition_3_3),
        (normalizer, "rnce_loss", linear_contrast_loss, normalizer.proposition_3_3),
        (fixed_points, "rnce_loss", tempered_rnce, fixed_points.rnce_recovers_the_data),
        (fixed_points, "linear_contrast_loss", rnce_loss, fixed_points.chain_bias),
        (policies, "info_nca_loss", half_info_nca, optima.info_nca_optimum),
        (policies, "nca_loss", half_nca, optima.nca_optimum_of_a_group),
        (online, "rnce_loss", tempered_rnce, online.beta_mismatch),
    ],
)
def test_a_wrong_loss_is_found_out(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, replacement: object, experiment: Callable[[], Findings]
) -> None:
    assert all(statement.holds for statement in experiment().statements)
    monkeypatch.setattr(module, name, replacement)
    assert not all(statement.holds for statement in experiment().statements)


# --- The tools --------------------------------------------------------------------------------------------------------


def lines_of(experiment: Callable[[], Findings]) -> dict[str, list[tuple[float, float]]]:
    return dict(experiment().curves[0].lines)


def test_one_completion_estimates_the_normaliser_by_its_own_implicit_reward() -> None:
    r = policies.numbers(concepts.SIZE, seed=60, scale=1.5)
    first = {name: points[0] for name, points in lines_of(concepts.normalizer_estimate).items()}
    assert first["mean, drawn from the reference"] == (1.0, pytest.approx(float(r.mean()), abs=1e-12))
    assert first["mean, drawn by the kernel"][1] == pytest.approx(float((r.softmax(dim=0) * r).sum()), abs=1e-12)
    assert first["5 % quantile, drawn from the reference"][1] == pytest.approx(float(r.min()), abs=1e-12)
    assert first["95 % quantile, drawn from the reference"][1] == pytest.approx(float(r.max()), abs=1e-12)
    assert first["true value; any draw by the kernel, log q correction"][1] == pytest.approx(
        float(r.exp().mean().log()), abs=1e-12
    )


def test_the_tables_of_the_page_are_those_of_a_run(whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    monkeypatch.setattr(sys, "path", [str(docs / "extensions"), *sys.path])
    tables = importlib.import_module("lab_tables")
    page = (docs / "lab.md").read_text(encoding="utf-8")
    rows = whole[1]["statements"]
    written = [line for line in page.splitlines() if line.startswith("| ") and line.endswith((" holds |", "HOLD |"))]
    found = [tables.row(Statement(*(row[key] for key in KEYS[:-1]))) for row in rows]
    hint = "run python docs/extensions/lab_tables.py"
    assert len(written) == len(found), hint
    assert f"\nThe {len(found)} rows below" in page, hint
    assert [line.count("| Statement |") for line in page.splitlines()].count(1) == len(run.EXPERIMENTS), hint
    for one, other in zip(written, found, strict=True):
        # Words, predicted number, tolerance and verdict; what was measured may be rounded otherwise.
        kept, made = (re.split(r"(?<!\\) \| ", line) for line in (one, other))
        assert (*kept[:3], *kept[4:]) == (*made[:3], *made[4:]), hint
        assert float(kept[3]) == pytest.approx(float(made[3]), rel=1e-4, abs=1e-9), hint
    curves = set(re.findall(r"^\| `(\w+)\.png`", page, re.MULTILINE))
    assert curves == set(CURVES)


def test_a_page_without_a_table_for_each_experiment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    monkeypatch.setattr(sys, "path", [str(docs / "extensions"), *sys.path])
    tables = importlib.import_module("lab_tables")
    found = [Findings("", [WRONG])]
    page = "The 7 rows below.\n\n| Statement | old |\n|---|---|\n| a | b |\n\nEnd.\n"
    written = tables.filled(page, found)
    assert written.startswith(
        f"The 1 rows below.\n\n{tables.HEADER}\n| 2 is 3 | <nowhere> | 3 | 2 | 0.5 | DOES NOT HOLD |\n\nEnd."
    )
    with pytest.raises(ValueError, match="1 tables of statements and there are 2 experiments"):
        tables.filled(page, found * 2)


def test_a_kernel_at_temperature_1_draws_by_the_softmax_of_the_negatives() -> None:
    lines = lines_of(concepts.temperature_of_the_kernel)
    expected = torch.tensor([1.2, 0.3, -0.6, -1.5], dtype=torch.float64).softmax(dim=0).tolist()
    drawn = [next(p for t, p in points if math.isclose(t, 1.0)) for points in lines.values()]
    assert drawn == pytest.approx(expected, abs=1e-12)
    assert list(lines) == [f"implicit reward {score:g}" for score in (1.2, 0.3, -0.6, -1.5)]


def test_the_plots_of_the_concepts_page_are_the_laboratorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    monkeypatch.setattr(sys, "path", [str(docs / "extensions"), *sys.path])
    files = importlib.import_module("concept_plots").draw_all(tmp_path)
    shown = re.findall(r"\(images/(\w+\.svg)\)", (docs / "concepts.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(file.name for file in files)
    for file in files:
        made, kept = (re.findall(r"-?\d+\.\d+", path.read_text()) for path in (file, docs / "images" / file.name))
        assert list(map(float, made)) == pytest.approx(list(map(float, kept)), abs=0.01), "run docs/extensions/concept_plots.py"


def test_multisets_have_multinomial_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    columns, counts, log_orders = policies.multisets(3, 4)
    found = policies.multiset_probabilities(counts, log_orders, probabilities)
    expected = torch.zeros_like(found)
    places = {tuple(row): place for place, row in enumerate(columns.tolist())}
    for row in policies.tuples(3, 4).tolist():
        expected[places[tuple(sorted(row))]] += probabilities[row].prod()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert float(policies.multisets(4, 50)[2].exp().sum()) == pytest.approx(4.0**50, rel=1e-10)


def test_expected_gradient_of_pairs_by_hand() -> None:
    # Positive from (3/4, 1/4), negative the other one: d/dr_0 is -3/4 sigma(r_1 - r_0) + 1/4 sigma(r_0 - r_1).
    r, data = torch.tensor([[math.log(2.0), 0.0]], dtype=torch.float64), torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    draws = partial(fixed_points.from_kernel, strategy="uniform")
    found = fixed_points.expected_gradient(r, data, draws, rnce_loss)
    slope = -0.75 / 3 + 0.25 * 2 / 3
    torch.testing.assert_close(found, torch.tensor([[slope, -slope]], dtype=torch.float64), rtol=0, atol=1e-14)


def test_negatives_of_a_chain_with_all_proposals_are_the_kernels() -> None:
    r = policies.numbers(2, 3, seed=0)
    found, added = fixed_points.from_chain(r, steps=2, num_proposals=2)
    expected = kernel_probabilities(
        r, torch.zeros(2, dtype=torch.long), policies.every(r), strategy="mc", include_positive=True
    )
    torch.testing.assert_close(found, expected.unsqueeze(1).expand(2, 3, 3), rtol=0, atol=1e-14)
    assert not added.any()


def test_minimum_of_a_loss_that_is_flat_in_a_direction() -> None:
    found = policies.minimum(lambda x: (x[0] - x[1] - 3) ** 4 + (x[0] - x[1] - 3) ** 2, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.5, -1.5], dtype=torch.float64), rtol=0, atol=1e-9)


def test_fitted_exponent_ignores_what_is_before_the_start() -> None:
    assert fitted_exponent([(1.0, 99.0), (2.0, 8.0), (4.0, 64.0)], start=2) == pytest.approx(3.0)

"""Whole targets on small data: every line is trained, and costs what it must."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dcx_kernels.recipes.reproduce import Reproduction, reproduce
from dcx_kernels.recipes.reproduce_figures import figures
from dcx_kernels.recipes.reproduce_scale import Options
from dcx_kernels.recipes.reproduce_table import cells_of
from dcx_kernels.recipes.reproduce_target import load_target

pytestmark = pytest.mark.slow


def _run(
    name: str,
    data: str,
    directory: Path,
    densities: Sequence[float] | None = None,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    width: float = 1 / 16,
    epochs: int = 2,
) -> Reproduction:
    target = load_target(name).narrowed(densities, models, seeds=seeds)
    options = Options({"cifar10": data}, epochs=epochs, batch_size=16, lr=0.02, width=width)
    found = reproduce(target, options, directory)
    assert not found.failed
    assert {entry.data for entry, _ in found.missing} <= {"cifar100", "svhn"}
    assert "figure.png" in figures(found)
    return found


def test_dce_table1_sizes_of_all_three_networks(data_file: Path, tmp_path: Path) -> None:
    """What the paper counts for its ordinary networks, and about what it keeps of them."""
    for model in ("vgg19", "resnet50", "densenet121"):
        directory = tmp_path / model
        found = _run("dce-table1", str(data_file), directory, [0.4], [model], width=1, epochs=1)
        baseline = cells_of(found, found.target.entries[0])
        assert found.target.entries[0].model == model
        assert baseline["params"].mean == pytest.approx(baseline["params"].paper, rel=0.01)
        assert baseline["macs"].mean == pytest.approx(baseline["macs"].paper, rel=0.03)
        for entry, rows in found.rows.items():
            if entry.variant == "two-stage":
                assert rows[0]["params"] < 0.5 * rows[0]["dense_params"]
                kept, whole = (sum(rows[0][k].values()) for k in ("widths", "channels"))
                assert kept == int(0.4 * whole + 1e-9)


def test_dce_table2_single_stage_is_frozen_and_shorter(data_file: Path, tmp_path: Path) -> None:
    found = _run("dce-table2", str(data_file), tmp_path, [0.2, 0.9], seeds=(0, 1), epochs=4)
    for entry in found.target.entries:
        assert len(found.rows[entry]) == 2
        change = cells_of(found, entry)["change"]
        assert (change.count == 2) == (entry.variant == "single-stage")
    arms = {
        path.name.split("-dce-")[1].partition("-0")[0]: sorted(
            part.name for part in (path / "checkpoints").iterdir()
        )
        for path in (tmp_path / "runs").iterdir()
    }
    # single-stage cuts the thin network out and is done
    assert arms == {"two-stage": ["sparse", "thin"], "single-stage": ["sparse"]}


@pytest.mark.parametrize(("name", "density"), [("dcp-table1", 0.52), ("dcp-table2", 0.49)])
def test_dcp_tables(tmp_path: Path, name: str, density: float) -> None:
    width = 1 / 16 if name == "dcp-table1" else 0.5
    found = _run(name, "digits", tmp_path, [density], width=width)
    baseline, scratch, trained = found.target.entries
    assert found.rows[trained][0]["start"]["recipe"] == "dense"
    # the baseline is trained once, for its line and for the trained one: both at two epochs
    names = [path.name for path in (tmp_path / "runs").iterdir() if "-dense-" in path.name]
    assert len(names) == 1
    for entry in (scratch, trained):
        cells = cells_of(found, entry)
        assert cells["change"].mean is not None and cells["change"].paper is not None
        assert cells["pruned"].mean > 30
    assert cells_of(found, baseline)["pruned"].mean == 0


def test_dcp_table4_all_policies(data_file: Path, tmp_path: Path) -> None:
    found = _run("dcp-table4", str(data_file), tmp_path, models=["vgg16"])
    assert [entry.variant for entry in found.rows] == [
        "lambda 0.1",
        "lambda 0.5",
        "lambda 0.9",
        "lambda changing",
    ]
    decays = [rows[0]["settings"].get("decay") for rows in found.rows.values()]
    assert decays == [0.1, 0.5, 0.9, None]


def test_dcp_figures(data_file: Path, tmp_path: Path) -> None:
    found = _run("dcp-figures", str(data_file), tmp_path, [0.6, 0.4], ["vgg16"], seeds=(0, 1))
    assert set(figures(found)) == {"figure.png", "channels-vgg16.png"}
    pruned = {e.density: cells_of(found, e)["pruned"].mean for e in found.target.entries}
    assert pruned[0.4] > pruned[0.6] > pruned[1.0] == 0

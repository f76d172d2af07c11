"""Whole networks on a GPU: sparse against masked training, in float64 and under autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_ops
from benchmarks.gate import check_training
from benchmarks.gpu import Ceilings, current_key, make_timer
from benchmarks.gpu_smoke import smoke_kernels, smoke_networks
from benchmarks.gpu_step import Setup, measure_block
from benchmarks.gpu_timer import CudaTimer
from benchmarks.problem import Problem, SetStream, Structure
from benchmarks.rows import GpuOpRow

pytestmark = pytest.mark.gpu

VGG = Problem("vgg19", 8, 0.5, "NHWC", device="cuda", dtype="bfloat16")


@pytest.mark.parametrize("grid", ["aligned", "odd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("model", "residual"),
    [
        ("vgg19", "keep"),
        ("resnet18", "tie"),
        ("resnet18", "union"),
        ("resnet50", "keep"),
        ("densenet121", "keep"),
    ],
)
def test_sparse_training_is_masked_training(
    model: str, residual: str, dtype: str, grid: str
) -> None:
    """float64 as well, each time; sets of new widths each step."""
    extent = 32 if model == "vgg19" else 64
    problem = replace(VGG, model=model, residual=residual, dtype=dtype, grid=grid, extent=extent)  # type: ignore[arg-type]
    structure = Structure.of(problem.converted("sparse"))
    stream = SetStream(structure, problem.density, True, seed=7, grid=grid)
    check_training(problem, [stream.fresh() for _ in range(2)])


@pytest.mark.parametrize("setting", ["own", "library"])
def test_forced_convolutions_train_as_well(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_CONV", setting)
    structure = Structure.of(VGG.converted("sparse"))
    stream = SetStream(structure, VGG.density, True, seed=8)
    check_training(VGG, [stream.fresh() for _ in range(2)])


def test_smoke() -> None:
    assert smoke_kernels("cuda") > 0
    smoke_networks("cuda")


def test_timer_measures_the_device() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    one, four = CudaTimer().time([lambda: a @ a, lambda: [a @ a for _ in range(4)]], 5, 2)
    assert len(one.device) == 5 and 0 < one.median < four.median
    assert all(us > 0 for us in one.host)


def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(VGG, width=1 / 4)
    key = current_key("cuda")
    rows = measure_block(Setup(problem), make_timer("cuda"), key, rounds=2, warmup=2)
    assert [row.arm for row in rows] == ["dense", "mask", "thin", "sparse"]
    for row in rows:
        assert row.step_ms > 0 and row.host_ms > 0 and row.peak_bytes > row.saved_bytes > 0


def test_an_operator_is_measured() -> None:
    timer, rows = make_timer("cuda"), list[GpuOpRow]()
    ceilings = Ceilings(4000.0, 800.0)
    key = current_key("cuda")
    blocks = gpu_ops.plan("cuda", torch.bfloat16, True, timer, ceilings, key, rows.append)
    notes = [note for block in blocks for note in block.run()]
    assert notes == []
    assert {"conv_fwd", "conv_dgrad", "conv_wgrad", "union_add", "sgd_step"} <= {
        row.op for row in rows
    }

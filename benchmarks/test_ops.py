"""Operators on VGG-19 layers: pytest benchmarks --benchmark-only [--ops-csv FILE].

Each result is checked before it is timed. Rates count what is needed at the density.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from benchmarks.arms import HYPER
from benchmarks.environment import Environment
from benchmarks.gate import check_float32
from benchmarks.ops_cases import CONV_ARMS, LAYERS, BatchNormCase, ConvCase, random_set
from benchmarks.problem import LAYOUTS, Problem, SetStream, Structure
from benchmarks.rows import OpRow, RowWriter
from dcx_kernels.ops.slot import ParameterSlot

BATCH, ROUNDS, WARMUP = 32, 20, 3
DENSITIES = (0.25, 0.5, 1.0)
per_layer = pytest.mark.parametrize("layer", LAYERS)
per_density = pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"d{d:g}")
per_layout = pytest.mark.parametrize("layout", LAYOUTS)

Measure = Callable[..., None]


@pytest.fixture
def measure(
    benchmark: Any, environment: Environment, op_writer: RowWriter[OpRow] | None
) -> Measure:
    """Time a function with pytest-benchmark and write its row."""

    def timed(
        call: Callable[[], object],
        op: str,
        layer: str,
        density: float,
        arm: str,
        layout: str = "-",
        macs: int = 0,
        moved: int = 0,
        error: float | None = None,
        setup: Callable[[], None] | None = None,
    ) -> None:
        benchmark.group = f"{op} {layer} {layout} d={density:g}"
        benchmark.extra_info.update(op=op, layer=layer, layout=layout, density=density, arm=arm)
        benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)
        if benchmark.stats is None or op_writer is None:
            return
        ms = 1e3 * np.asarray(benchmark.stats.stats.data)
        median = float(np.median(ms))
        op_writer.write(
            OpRow(
                **asdict(environment), device="cpu", layout=layout, dtype="float32", batch=BATCH,
                layer=layer, op=op, density=density, arm=arm, rounds=len(ms), median_ms=median,
                p20_ms=float(np.percentile(ms, 20)), p80_ms=float(np.percentile(ms, 80)),
                p99_ms=float(np.percentile(ms, 99)),
                gflop_per_s=2e-6 * macs / median if macs else None,
                gb_per_s=1e-6 * moved / median if moved else None,
                error=error,
            )
        )  # fmt: skip

    return timed


@per_layout
@per_layer
@per_density
@pytest.mark.parametrize("op", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("arm", CONV_ARMS)
def test_channel_conv2d(
    measure: Measure, op: str, arm: str, layer: str, density: float, layout: str
) -> None:
    """Convolution; naive is index_select, conv, index_copy_ (pytorch#18665)."""
    arguments = LAYERS[layer], density, BATCH, LAYOUTS[layout]
    case = ConvCase(*arguments)
    run = case.run(op, arm)
    error = None
    if arm != "dense" or density == 1:
        truth, thin = ConvCase(*arguments, torch.float64).run(op, "thin"), case.run(op, "thin")
        error = _check(run.dense_of(run.call()), thin, truth, case, op, arm)
    measure(run.call, f"conv_{op}", layer, density, arm, layout, macs=case.macs, error=error)


def _check(actual: Tensor, thin: Any, truth: Any, case: ConvCase, op: str, arm: str) -> float:
    if op == "wgrad" and arm == "mask":  # inactive inputs were masked, so their gradients are zero
        assert not actual[:, ~case.s_in.mask()].any()
    return check_float32(
        actual, thin.dense_of(thin.call()), truth.dense_of(truth.call()), f"{arm} {op}"
    )


@per_layout
@per_layer
@per_density
@pytest.mark.parametrize("arm", ["dense", "mask", "thin", "sparse"])
def test_channel_batch_norm(
    measure: Measure, arm: str, layer: str, density: float, layout: str
) -> None:
    """Batch norm and ReLU, forward and backward."""
    arguments = LAYERS[layer], density, BATCH, LAYOUTS[layout]
    case = BatchNormCase(*arguments)
    run = case.run(arm)
    error = None
    if arm != "dense" or density == 1:
        truth, thin = BatchNormCase(*arguments, torch.float64).run("thin"), case.run("thin")
        own, exact = thin.dense_of(thin.call()), truth.dense_of(truth.call())
        error = check_float32(run.dense_of(run.call()), own, exact, arm)
    measure(run.call, "batch_norm", layer, density, arm, layout, moved=case.bytes, error=error)


@per_layer
@per_density
@pytest.mark.parametrize("op", ["gather", "scatter"])
@pytest.mark.parametrize("arm", ["copy", "sparse"])
def test_weight(measure: Measure, op: str, arm: str, layer: str, density: float) -> None:
    """Moving the active slice of a weight, against a plain copy of as many bytes."""
    shape = LAYERS[layer]
    parameter = nn.Parameter(torch.randn(shape.channels_out, shape.channels_in, 3, 3))
    slot = ParameterSlot(parameter)
    s_in = random_set(shape.channels_in, density, 1)
    s_out = random_set(shape.channels_out, density, 2)
    slot.set_active(s_out, s_in)
    expected = parameter.detach()[s_out.indices][:, s_in.indices].contiguous()
    buffer, rows = torch.empty(expected.numel()), slot.rows()
    moved = 2 * expected.numel() * expected.element_size()
    if arm == "copy" or rows is None:
        if arm == "sparse":
            pytest.skip("all channels are active: nothing is moved")
        measure(
            lambda: buffer.copy_(expected.view(-1)),
            f"weight_{op}",
            layer,
            density,
            arm,
            moved=moved,
        )
        return
    weight = parameter.detach()
    assert torch.equal(rows.gather(weight, buffer), expected)
    call: Callable[[], object] = lambda: rows.gather(weight, buffer)  # noqa: E731
    if op == "scatter":
        into = torch.zeros_like(weight)
        rows.scatter_(into, expected)
        inverse_in, inverse_out = ~s_in.mask(), ~s_out.mask()
        assert torch.equal(into[s_out.indices][:, s_in.indices], expected)
        assert not into[:, inverse_in].any() and not into[inverse_out].any()
        call = lambda: rows.scatter_(into, expected)  # noqa: E731
    measure(call, f"weight_{op}", layer, density, arm, moved=moved)


@per_density
@pytest.mark.parametrize("arm", ["dense", "mask", "thin", "sparse"])
def test_optimizer_step(measure: Measure, arm: str, density: float) -> None:
    """SGD with Nesterov momentum on all of VGG-19; torch's is fused."""
    problem = Problem("vgg19", 2, density, "NCHW")
    model: Any = problem.converted("mask" if arm == "mask" else "sparse")
    stream = SetStream(Structure.of(model), density, varying=False, seed=3)
    model.set_active(stream.fresh())
    if arm in ("dense", "thin"):
        model = problem.network() if arm == "dense" else dcx.compact(model)
    optimizer: torch.optim.Optimizer
    if arm == "sparse":
        optimizer = dcx.optim.SGD(model, **HYPER)
    else:
        optimizer = torch.optim.SGD(model.parameters(), fused=True, **HYPER)
    images, labels = problem.data()

    def gradients() -> None:
        if arm in ("mask", "sparse"):
            model.set_active(stream.fresh())
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    measure(optimizer.step, "sgd_step", "vgg19", density, arm, setup=gradients)

"""Batch norm equals the reference's, statistics, gradients and saliency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton import batch_norm
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

SHAPES = {
    "odd": (2, 37, 3, 3),
    "folded": (4, 17, 2, 4),
    "vectors": (2, 64, 2, 4),
    "one-channel": (1, 1, 5, 5),
    "line": (3, 7, 6),
    "pixel": (9, 63, 1, 1),
    "long": (2, 3, 21, 30),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = ["y", "mean", "invstd", "running_mean", "running_var", "dx", "dweight", "dbias", "saliency"]
Run = dict[str, Tensor]


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, device: torch.device
) -> dict[str, Tensor]:
    channels = shape[1]
    last = form != "contiguous" and len(shape) == 4
    layout = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(device, dtype).contiguous(memory_format=layout) for _ in "xy")
    active = torch.randperm(channels + 4)[:channels].sort().values.to(device)
    running = torch.randn(2, channels + 4).to(device)
    weight, bias = torch.randn(2, channels).to(device, dtype)
    return {
        "x": x * 2 + 1,
        "dy": dy if form != "mixed" else dy.contiguous(),
        "weight": weight,
        "bias": bias,
        "running_mean": running[0].clone(),
        "running_var": running[1].exp(),
        "active": active,
    }


def _run(
    backend: Any,
    given: dict[str, Tensor],
    compute: torch.dtype | None = None,
    training: bool = True,
    relu: bool = True,
    per_sample: bool = False,
    without: tuple[str, ...] = (),
) -> Run:
    def get(name: str) -> Tensor | None:
        if name in without:
            return None
        value = given[name].clone()
        return value if compute is None or name == "active" else value.to(compute)

    x, dy, weight, bias = get("x"), get("dy"), get("weight"), get("bias")
    mean, var = get("running_mean"), get("running_var")
    active = get("active")
    y, used, invstd = backend.channel_batch_norm_fwd(
        x, weight, bias, mean, var, active, training, 0.3, 1e-3, relu
    )
    kept = y if relu else None
    gradients = backend.channel_batch_norm_bwd(
        dy, x, kept, weight, bias, used, invstd, training, 1e-3, per_sample
    )
    results = (y, used, invstd, mean, var, *gradients)
    return {name: r for name, r in zip(NAMES, results, strict=True) if r is not None}


def _other_orders(given: dict[str, Tensor], **options: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield torch's sums of the same terms in other orders: one order's error may be chance."""
    pixels = given["x"].shape[2:].numel()
    for _ in range(6):
        order = torch.randperm(pixels, device=given["x"].device)
        shuffled = {name: given[name].flatten(2)[..., order] for name in ("x", "dy")}
        result = _run(reference, {**given, **shuffled}, torch.float32, **options)
        yield from ((name, result[name]) for name in result if name not in ("y", "dx"))


def _compare(given: dict[str, Tensor], **options: Any) -> None:
    dtype = given["x"].dtype
    actual = _run(batch_norm, given, **options)
    truth = _run(reference, given, torch.float64, **options)
    # of half precision torch's error is that of rounding what float32 gives
    same = _run(reference, given, torch.float32, **options)
    for name, value in _other_orders(given, **options):
        further = (value - truth[name]).abs() > (same[name] - truth[name]).abs()
        same[name] = torch.where(further, value, same[name])
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        rounded = same[name].to(dtype if name in ("y", "dx") else torch.float32)
        assert_close_to_float64(value, rounded, truth[name], name)
    for name in ("y", "dx"):
        assert actual[name].stride() == given["x"].stride()


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_training(
    shape: tuple[int, ...], form: str, per_sample: bool, device: torch.device
) -> None:
    _compare(_inputs(shape, torch.float32, form, device), per_sample=per_sample)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_dtypes_and_modes(
    dtype: torch.dtype, training: bool, relu: bool, device: torch.device
) -> None:
    given = _inputs((3, 17, 2, 4), dtype, "mixed", device)
    _compare(given, training=training, relu=relu, per_sample=relu)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("without", ["weight", "bias", "active", "running", "both"])
def test_what_may_be_none(without: str, per_sample: bool, device: torch.device) -> None:
    given = _inputs((3, 17, 3, 2), torch.float32, "channels_last", device)
    names = {"running": ("running_mean", "running_var"), "both": ("weight", "bias")}
    if without == "active":
        given = {n: v[:17] if n.startswith("running") else v for n, v in given.items()}
    _compare(given, without=names.get(without, (without,)), per_sample=per_sample)


def test_inactive_statistics_stay(device: torch.device) -> None:
    given = _inputs((3, 5, 3, 2), torch.float32, "channels_last", device)
    for training in (True, False):
        actual = _run(batch_norm, given, training=training)
        rest = torch.ones(9, dtype=torch.bool, device=device).index_fill(0, given["active"], False)
        rest |= not training
        for name in ("running_mean", "running_var"):
            assert_exact(actual[name][rest], given[name][rest], name)


def test_inactive_statistics_are_not_read(device: torch.device) -> None:
    given = _inputs((3, 5, 3, 2), torch.float32, "contiguous", device)
    rest = torch.ones(9, dtype=torch.bool, device=device).index_fill(0, given["active"], False)
    given["running_mean"][rest] = float("nan")
    given["running_var"][rest] = float("nan")
    actual = _run(batch_norm, given, training=False)
    for name in ("y", "mean", "invstd", "dx", "saliency"):
        assert actual[name].isfinite().all(), name


def test_large_mean(device: torch.device) -> None:
    given = _inputs((4, 3, 9, 8), torch.float32, "channels_last", device)
    given["x"] = given["x"] + 1e4
    actual, truth = _run(batch_norm, given), _run(reference, given, torch.float64)
    # the mean is a float32: of 1e4 it has 1e-3 / 2, which is what outputs are off by
    for name in ("y", "dweight", "dx"):
        assert (actual[name].double() - truth[name]).norm() < 2e-3 * truth[name].norm(), name
    assert ((actual["invstd"].double() / truth["invstd"]) - 1).abs().max() < 5e-4


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_is_zero_where_the_output_is(training: bool, device: torch.device) -> None:
    given = _inputs((2, 3, 4, 4), torch.float32, "contiguous", device)
    for name, value in (("x", 0.5), ("running_mean", 0.5), ("bias", 0.0)):
        given[name].fill_(value)
    actual = _run(batch_norm, given, training=training)
    assert actual["y"].eq(0).all()
    assert actual["dbias"].eq(0).all() and actual["dx"].eq(0).all()


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (3, 0, 2, 2)], ids=str)
def test_empty(
    shape: tuple[int, ...], training: bool, per_sample: bool, device: torch.device
) -> None:
    given = _inputs(shape, torch.float32, "contiguous", device)
    actual = _run(batch_norm, given, training=training, per_sample=per_sample)
    expected = _run(reference, given, training=training, per_sample=per_sample)
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert torch.allclose(actual[name], value), name


def test_float64_is_the_reference(device: torch.device) -> None:
    given = _inputs((2, 5, 3, 2), torch.float32, "contiguous", device)
    actual = _run(batch_norm, given, torch.float64)
    for name, value in _run(reference, given, torch.float64).items():
        assert_exact(actual[name], value, name)


def test_rerun_bit_equal_and_nothing_left_unwritten(device: torch.device) -> None:
    given = _inputs((3, 11, 4, 4), torch.bfloat16, "channels_last", device)

    def run() -> list[Tensor]:
        return [*_run(batch_norm, given).values()]

    assert_reruns_equal(run, 2)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory is filled with NaN
    try:
        for result in [*run(), _run(batch_norm, given, per_sample=True)["saliency"]]:
            assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(deterministic)

"""Batch norm on the emulated GPU, through the functions of the backend, against the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native.cuda import batch_norm
from tests.csrc.norm_cases import (
    DTYPES,
    NAMES,
    SHAPES,
    EmulatedNorm,
    compare,
    inputs,
    lay,
    oracle,
    replace_operators,
    run,
)
from tolerances import assert_exact


@pytest.fixture
def ops(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> EmulatedNorm:
    """Run the operators emulated."""
    return replace_operators(built, monkeypatch)


@pytest.fixture
def both_orders(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> EmulatedNorm:
    """Run the operators emulated, threads in either order."""
    return replace_operators(emulated, monkeypatch)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("form", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_training(
    both_orders: EmulatedNorm, shape: tuple[int, ...], form: str, per_sample: bool
) -> None:
    given = inputs(shape)
    actual = compare(given, (form, form), per_sample=per_sample)
    for name in ("y", "dx"):
        assert actual[name].stride() == lay(given["x"], form).stride()
    assert both_orders.called == ["fwd", "bwd"]
    pixels = given["x"].shape[2:].numel()
    last = pixels == 1 or (form == "last" and shape[1] > 1 and len(shape) > 3)
    assert both_orders.last == [last] * 2


@pytest.mark.parametrize("form", ["first", "last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_dtypes_and_modes(
    ops: EmulatedNorm, dtype: torch.dtype, relu: bool, training: bool, form: str
) -> None:
    for shape in ((3, 17, 5, 7), (3, 40, 3, 6), (2, 3, 12, 40), (3, 12, 5, 4)):
        given = inputs(shape, dtype)
        for per_sample in (False, True):
            compare(given, (form, form), relu=relu, training=training, per_sample=per_sample)
    assert ops.called == ["fwd", "bwd"] * 8


@pytest.mark.parametrize("form", ["first", "last"])
def test_vectors_of_another_dtype(ops: EmulatedNorm, form: str) -> None:
    """float32 vectors of a bfloat16 tensor; statistics in bfloat16, as of a network cast whole."""
    given = inputs((3, 17, 4, 3), torch.bfloat16)
    wide = inputs((3, 17, 4, 3))
    compare({**given, "weight": wide["weight"], "bias": wide["bias"]}, (form, form))
    for dtype in (torch.bfloat16, torch.float16):
        running = {n: given[n].to(dtype) for n in ("running_mean", "running_var")}
        for training in (True, False):
            compare({**given, **running}, (form, form), training=training)
    assert ops.called == ["fwd", "bwd"] * 5


@pytest.mark.parametrize("dy", ["first", "last", "padded", "odd address"])
@pytest.mark.parametrize("x", ["first", "last", "padded", "odd address"])
def test_layouts_are_brought_together(ops: EmulatedNorm, x: str, dy: str) -> None:
    compare(inputs((3, 19, 4, 5)), (x, dy), per_sample=True)
    assert ops.last == [x in ("last", "padded")] * 2


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("without", ["weight", "bias", "active", "running", "both"])
def test_what_may_be_none(ops: EmulatedNorm, without: str, per_sample: bool) -> None:
    given = inputs((3, 17, 3, 2))
    names = {"running": ("running_mean", "running_var"), "both": ("weight", "bias")}
    if without == "active":
        given = {n: v[:17] if n.startswith("running") else v for n, v in given.items()}
    for form in ("first", "last"):
        compare(given, (form, form), without=names.get(without, (without,)), per_sample=per_sample)
    assert len(ops.called) == 4


def test_inactive_statistics_stay_and_are_not_read(ops: EmulatedNorm) -> None:
    given = inputs((3, 5, 3, 2))
    rest = torch.ones(9, dtype=torch.bool).index_fill(0, given["active"], False)
    for name in ("running_mean", "running_var"):
        given[name][rest] = float("nan")
    for training in (True, False):
        actual = run(batch_norm, given, training=training)
        for name in ("y", "mean", "invstd", "dx", "saliency"):
            assert actual[name].isfinite().all(), name
        for name in ("running_mean", "running_var"):
            left = rest | (not training)
            assert_exact(actual[name][left], given[name][left], name)
            if training:
                assert actual[name][~rest].ne(given[name][~rest]).all()
    assert len(ops.called) == 4


@pytest.mark.parametrize("form", ["first", "last"])
def test_large_mean(ops: EmulatedNorm, form: str) -> None:
    """Squares of numbers around 1e4 would leave nothing of a variance of 4."""
    given = inputs((4, 3, 9, 16))
    given["x"] = given["x"] + 1e4
    actual, truth = run(batch_norm, given, (form, form)), oracle(given, torch.float64)
    for name in ("mean", "invstd", "running_mean", "running_var"):
        error = (actual[name] / truth[name] - 1).abs().max()
        assert error < (5e-4 if name in ("invstd", "running_var") else 2e-7), name
    # the mean is a float32: of 1e4 it has 1e-3 / 2, which is what outputs are off by
    for name in ("y", "dweight", "dx"):
        assert (actual[name] - truth[name]).norm() < 2e-3 * truth[name].norm(), name
    assert ops.called == ["fwd", "bwd"]


@pytest.mark.parametrize("form", ["first", "last"])
def test_far_outliers(ops: EmulatedNorm, form: str) -> None:
    """A black border or a dead start must not cost accuracy."""
    given = inputs((4, 3, 9, 16))
    given["x"][0] = 1e3
    compare(given, (form, form))
    assert ops.called == ["fwd", "bwd"]


@pytest.mark.parametrize("form", ["first", "last"])
def test_one_value_of_a_channel(ops: EmulatedNorm, form: str) -> None:
    """Its variance has no unbiased estimate: NaN, as in torch; all else is finite."""
    given = inputs((1, 5, 1, 1))
    actual = run(batch_norm, given, (form, form))
    assert actual["running_var"][given["active"]].isnan().all()
    for name in NAMES:
        if name != "running_var":
            assert actual[name].isfinite().all(), name
    assert_exact(actual["mean"], given["x"].flatten())
    assert ops.called == ["fwd", "bwd"]


@pytest.mark.parametrize("form", ["first", "last"])
def test_nan_passes_and_stays_in_its_channel(ops: EmulatedNorm, form: str) -> None:
    given = inputs((3, 5, 4, 4))
    given["x"][1, 2, 0, 0] = float("nan")
    actual, expected = run(batch_norm, given, (form, form)), oracle(given, torch.float32)
    for name, value in expected.items():
        assert torch.equal(actual[name].isnan(), value.isnan()), name
    assert actual["y"].isnan().any() and actual["y"][:, 0].isfinite().all()
    assert ops.called == ["fwd", "bwd"]


def test_infinities_do_not_reach_a_frozen_gradient(ops: EmulatedNorm) -> None:
    """0 * inf is NaN: statistics that are constants leave their terms out."""
    given = inputs((2, 4, 3, 3))
    given["x"][1, 2, 1, 1] = float("inf")
    actual = run(batch_norm, given, training=False, relu=False)
    expected = oracle(given, torch.float32, training=False, relu=False)
    assert actual["dx"].isfinite().all() and expected["dx"].isfinite().all()
    assert torch.allclose(actual["dx"], expected["dx"])
    assert ops.called == ["fwd", "bwd"]


@pytest.mark.parametrize("form", ["first", "last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_is_zero_where_the_output_is(ops: EmulatedNorm, training: bool, form: str) -> None:
    given = inputs((2, 3, 4, 4))
    for name, value in (("x", 0.5), ("running_mean", 0.5), ("bias", 0.0)):
        given[name].fill_(value)
    actual = run(batch_norm, given, (form, form), training=training)
    assert actual["y"].eq(0).all()
    assert actual["dbias"].eq(0).all() and actual["dx"].eq(0).all()
    assert ops.called == ["fwd", "bwd"]


def test_gradient_is_cut_exactly_where_the_output_is(ops: EmulatedNorm) -> None:
    """Backward computes the sign again: with weights and shifts that round, not one may differ."""
    given = inputs((4, 17, 12, 11))
    for name in ("x", "bias", "weight"):
        given[name] = (given[name] * 4).round() / 4  # h is often about 0
    for form in ("first", "last"):
        for training in (True, False):
            actual = run(batch_norm, {**given, "dy": torch.ones_like(given["dy"])}, (form, form),
                          training=training)  # fmt: skip
            passed = (actual["y"] > 0).sum((0, 2, 3)).float()
            assert_exact(actual["dbias"], passed)
    assert len(ops.called) == 8


@pytest.mark.parametrize("form", ["first", "last"])
def test_reruns_are_bit_equal_in_either_order(
    built: ModuleType, ops: EmulatedNorm, form: str
) -> None:
    given = inputs((3, 33, 16, 17), torch.bfloat16)
    runs = []
    for last_first in (False, True, False):
        built.last_first(last_first)
        of_samples = run(batch_norm, given, (form, form), per_sample=True)["saliency"]
        runs.append([*run(batch_norm, given, (form, form)).values(), of_samples])
    built.last_first(False)
    for again in runs[1:]:
        for value, wanted in zip(again, runs[0], strict=True):
            assert_exact(value, wanted)
    assert len(ops.called) == 12


def test_the_rest_is_the_references(ops: EmulatedNorm) -> None:
    """float64, empty tensors, vectors that are not contiguous, gradients of another dtype."""
    given = inputs((2, 5, 3, 2))
    strided = {**given, "weight": torch.randn(5, 2)[:, 0]}
    double = {n: v if n == "active" else v.double() for n, v in given.items()}
    cases = [strided, double, inputs((0, 5, 3, 2)), inputs((2, 5, 0, 2)), inputs((3, 0, 2, 2))]
    for case in cases:
        for name, value in run(reference, case).items():
            assert_exact(run(batch_norm, case)[name], value, name)
    assert ops.called == []
    running = torch.randn(9), torch.rand(9, 2)[:, 0]
    rest = (*running, given["active"], True, 0.1, 1e-3, True)
    batch_norm.channel_batch_norm_fwd(given["x"], None, None, *rest)
    mixed = (given["dy"].double(), given["x"], None, None, None, *torch.randn(2, 5), False)
    batch_norm.channel_batch_norm_bwd(*mixed, 1e-3, False)
    mean = torch.randn(5).double(), torch.rand(5).double()
    batch_norm.channel_batch_norm_bwd(
        given["dy"], given["x"], None, None, None, *mean, False, 1e-3, False
    )
    assert ops.called == []

"""Passes over norms with ReLU equal their definition, in every form of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton import _walk
from dcx_kernels.kernels.triton.norm_act import norm_act_bwd, norm_act_fwd, norm_grad
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

SHAPES = {
    "odd": (2, 37, 3, 3),
    "folded": (4, 17, 2, 4),
    "vectors": (2, 64, 2, 4),
    "one-channel": (1, 1, 5, 5),
    "samples": (33, 3, 1, 2),
    "line": (3, 7, 6),
    "matrix": (9, 63),
    "pixel": (5, 12, 1, 1),
    "long": (2, 3, 21, 30),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = ["contiguous", "channels_last", "slice"]


def _make(shape: tuple[int, ...], dtype: torch.dtype, form: str, device: torch.device) -> Tensor:
    """Return random numbers in a layout, between NaN that must not be read."""
    last = form != "contiguous" and len(shape) == 4
    x = torch.randn(shape[0], shape[1] + 3, *shape[2:]).to(device, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    if form == "slice":
        x[:, shape[1] :] = float("nan")
        return x[:, : shape[1]]
    return x[:, : shape[1]].contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )


def _norm(channels: int, device: torch.device) -> Norm:
    return Norm(*torch.randn(3, channels).to(device).unbind(0))


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def _h(y: Tensor, norm: Norm) -> Tensor:
    return (y - _column(norm.center, y)) * _column(norm.scale, y) + _column(norm.shift, y)


def _dh(dz: Tensor, y: Tensor, norm: Norm, relu: bool) -> Tensor:
    return torch.where(_h(y, norm) > 0, dz, 0.0) if relu else dz


def _dy(dy: Tensor, grad: NormGrad, compute: torch.dtype) -> Tensor:
    dy, y = dy.to(compute), grad.y.to(compute)
    if grad.norm is not None:
        dy = _dh(dy, y, grad.norm, grad.relu) * _column(grad.norm.scale, y)
    return dy + (y - _column(grad.center, y)) * _column(grad.slope, y) + _column(grad.offset, y)


def _sums(dz: Tensor, y: Tensor, norm: Norm, relu: bool, per_sample: bool) -> tuple[Tensor, Tensor]:
    dh = _dh(dz, y, norm, relu)
    both = dh * (y - _column(norm.center, y)), dh
    dims = [dim for dim in range(y.dim()) if dim > 1 or (dim == 0 and not per_sample)]
    return both if not dims else (both[0].sum(dims), both[1].sum(dims))


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fwd(shape: tuple[int, ...], form: str, relu: bool, device: torch.device) -> None:
    y, norm = _make(shape, torch.float32, form, device), _norm(shape[1], device)
    z = norm_act_fwd(y, norm, relu)
    same, truth = _h(y, norm), _h(y.double(), norm)
    if relu:
        same, truth = same.relu(), truth.relu()
    assert_close_to_float64(z, same, truth)
    assert z.stride() == torch.empty_like(y).stride()


@pytest.mark.parametrize("kind", ["before", "behind", "relu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_grad(shape: tuple[int, ...], form: str, kind: str, device: torch.device) -> None:
    y, norm = _make(shape, torch.float32, form, device), _norm(shape[1], device)
    slope, offset = torch.randn(2, shape[1]).to(device).unbind(0)
    behind = None if kind == "before" else norm
    grad = NormGrad(y, norm.center, slope, offset, behind, kind == "relu")
    dy = _make(shape, torch.float32, "contiguous", device)  # not always in the form of y
    dx = norm_grad(dy, grad)
    assert_close_to_float64(dx, _dy(dy, grad, torch.float32), _dy(dy, grad, torch.float64))
    assert dx.stride() == dy.stride()


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bwd(shape: tuple[int, ...], form: str, per_sample: bool, device: torch.device) -> None:
    y, norm = _make(shape, torch.float32, form, device), _norm(shape[1], device)
    dz = _make(shape, torch.float32, form, device)
    actual = norm_act_bwd(dz, y, norm, True, per_sample)
    same = _sums(dz, y, norm, True, per_sample)
    truth = _sums(dz.double(), y.double(), norm, True, per_sample)
    for name, *values in zip(("dscale", "dshift"), actual, same, truth, strict=True):
        assert_close_to_float64(*values, name)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES.keys())[1:])
def test_half_precision(dtype: torch.dtype, form: str, device: torch.device) -> None:
    shape = (3, 17, 4, 8)
    y, dz = _make(shape, dtype, form, device), _make(shape, dtype, "channels_last", device)
    norm = _norm(17, device)
    z = norm_act_fwd(y, norm, True)
    assert_close_to_float64(z, _h(y, norm).relu(), _h(y.double(), norm).relu())
    slope, offset = torch.randn(2, 17).to(device).unbind(0)
    grad = NormGrad(y, norm.center, slope, offset, norm, False)
    assert_close_to_float64(norm_grad(dz, grad), _dy(dz, grad, dtype), _dy(dz, grad, torch.float64))
    actual = norm_act_bwd(dz, y, norm, False, False)
    same = _sums(dz.float(), y.float(), norm, False, False)
    truth = _sums(dz.double(), y.double(), norm, False, False)
    for values in zip(actual, same, truth, strict=True):
        assert_close_to_float64(*values)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("form", FORMS)
def test_many_tiles_a_program(
    form: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(_walk, "_PROGRAMS", 2)  # as in large tensors
    _walk.plan.cache_clear()
    y, dz = (_make((3, 5, 25, 27), torch.float32, form, device) for _ in "yz")
    norm = _norm(5, device)
    actual = norm_act_bwd(dz, y, norm, True, per_sample)
    _walk.plan.cache_clear()
    same = _sums(dz, y, norm, True, per_sample)
    truth = _sums(dz.double(), y.double(), norm, True, per_sample)
    for name, *values in zip(("dscale", "dshift"), actual, same, truth, strict=True):
        assert_close_to_float64(*values, name)


def test_gradient_at_zero_is_zero(device: torch.device) -> None:
    one, nought = torch.ones(2, device=device), torch.zeros(2, device=device)
    y = torch.zeros(1, 2, 3, 3, device=device)
    norm = Norm(one, nought, nought)
    assert norm_grad(y + 1, NormGrad(y, nought, nought, nought, norm, True)).eq(0).all()
    assert norm_act_bwd(y + 1, y, norm, True, False)[1].eq(0).all()
    assert norm_act_bwd(y + 1, y, norm, False, False)[1].eq(9).all()


def test_nan_comes_out_of_relu(device: torch.device) -> None:
    y = torch.full((1, 2, 3, 3), float("nan"), device=device)
    assert norm_act_fwd(y, _norm(2, device), True).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    y, norm = torch.empty(shape, device=device), _norm(shape[1], device)
    assert_exact(norm_act_fwd(y, norm, True), y)
    assert_exact(norm_grad(y, NormGrad(y, *norm)), y)
    for per_sample in (False, True):
        for total in norm_act_bwd(y, y, norm, True, per_sample):
            assert_exact(total, torch.zeros(shape[not per_sample : 2], device=device))


def test_rerun_bit_equal_and_nothing_left_unwritten(device: torch.device) -> None:
    y = _make((3, 11, 4, 4), torch.bfloat16, "channels_last", device)
    dz = _make((3, 11, 4, 4), torch.bfloat16, "channels_last", device)
    norm = _norm(11, device)
    grad = NormGrad(y, *norm, norm, True)

    def run() -> list[Tensor]:
        sums = [*norm_act_bwd(dz, y, norm, True, False), *norm_act_bwd(dz, y, norm, True, True)]
        return [norm_act_fwd(y, norm, True), norm_grad(dz, grad), *sums]

    assert_reruns_equal(run, 2)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory is filled with NaN
    try:
        for result in run():
            assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(deterministic)

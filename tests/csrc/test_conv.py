"""The convolution kernels of csrc, emulated: every path against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from tests.tolerances import assert_close_to_float64, assert_exact

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_TILES = {"128x128": 0, "128x64": 1, "64x64": 2}
_CHECKED = [torch.bfloat16, torch.float16, torch.float32]

# x (N, c, H, W); K, C of the full weight; k; filter; stride; padding; dilation
_Case = tuple[tuple[int, ...], tuple[int, int], int, list[int], list[int], list[int], list[int]]
_CASES: dict[str, _Case] = {
    "aligned": ((2, 40, 5, 6), (70, 64), 64, [3, 3], [1, 1], [1, 1], [1, 1]),
    "odd": ((2, 17, 5, 4), (64, 20), 63, [3, 3], [1, 1], [1, 1], [1, 1]),
    "one": ((1, 1, 3, 3), (3, 3), 1, [3, 3], [1, 1], [1, 1], [1, 1]),
    "all": ((1, 3, 4, 4), (5, 3), 5, [1, 1], [1, 1], [0, 0], [1, 1]),
    "stride": ((2, 8, 7, 6), (20, 16), 16, [3, 2], [2, 2], [1, 0], [1, 1]),
    "1x1 stride": ((1, 8, 5, 5), (9, 9), 8, [1, 1], [2, 2], [0, 0], [1, 1]),
    "dilation": ((1, 16, 8, 7), (18, 18), 10, [3, 3], [1, 2], [2, 1], [2, 3]),
    "many tiles": ((2, 40, 9, 9), (150, 48), 140, [1, 1], [1, 1], [0, 0], [1, 1]),
}


def _lists(chosen: int, existing: int, samples: int | None) -> Tensor:
    each = [torch.randperm(existing)[:chosen].sort()[0] for _ in range(samples or 1)]
    return each[0] if samples is None else torch.stack(each)


def _said(tensor: Tensor) -> tuple[int, list[int], list[int]]:
    return tensor.data_ptr(), list(tensor.shape), list(tensor.stride())


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=form)


class _Made:
    """Operands of a case; the inactive part of the weight is NaN."""

    def __init__(self, case: str, dtype: torch.dtype, last: bool, per_sample: bool) -> None:
        torch.manual_seed(len(case))
        shape, full, k, filters, *window = _CASES[case]
        samples = shape[0] if per_sample else None
        form = torch.channels_last if last else torch.contiguous_format
        self.x = torch.randn(shape).to(dtype).contiguous(memory_format=form)
        self.in_idx, self.out_idx = _lists(shape[1], full[1], samples), _lists(k, full[0], samples)
        self.weight = torch.randn(*full, *filters).to(dtype)
        self.bias = torch.randn(full[0]).to(dtype)
        if not per_sample:
            active = torch.zeros(full, dtype=torch.bool)
            active[self.out_idx[:, None], self.in_idx] = True
            self.weight[~active] = float("nan")
        self.window = window
        self.per_sample = per_sample

    def fwd(self, dtype: torch.dtype) -> Tensor:
        x, weight, bias = (one.to(dtype) for one in (self.x, self.weight, self.bias))
        args = (x, weight, bias, self.in_idx, self.out_idx, *self.window)
        if self.per_sample:
            return reference.sample_conv2d_fwd(*args)
        return reference.channel_conv2d_fwd(*args, 1, 1)

    def dgrad(self, dy: Tensor, dtype: torch.dtype) -> Tensor:
        args = (dy.to(dtype), self.x.to(dtype), self.weight.to(dtype), self.in_idx, self.out_idx)
        if self.per_sample:
            return reference.sample_conv2d_dgrad(*args, *self.window)
        return reference.channel_conv2d_dgrad(*args, *self.window, 1, 1)


def _close(actual: Tensor, same: Callable[[torch.dtype], Tensor], what: str) -> None:
    """Compare with the truth; what TF32 may lose on top of fp32 is what fp16 loses."""
    truth = same(torch.float64)
    if actual.dtype == torch.float32:
        actual = actual.half()
    own = same(actual.dtype)
    assert_close_to_float64(actual, own, truth, what)


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize("case", _CASES)
def test_fwd_and_dgrad(emulated: ModuleType, case: str, per_sample: bool) -> None:
    dtype, last, tile = torch.bfloat16, True, _TILES["64x64"]
    _check(emulated, _Made(case, dtype, last, per_sample), dtype, last, tile)


@pytest.mark.parametrize("dtype", _CHECKED, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
def test_types_and_layouts(built: ModuleType, dtype: torch.dtype, last: bool) -> None:
    for case in ("aligned", "odd"):
        _check(built, _Made(case, dtype, last, False), dtype, last, _TILES["64x64"])


@pytest.mark.parametrize("dtype", _CHECKED, ids=str)
@pytest.mark.parametrize("tile", ["128x128", "128x64"])
def test_tiles(built: ModuleType, tile: str, dtype: torch.dtype) -> None:
    made = _Made("many tiles", dtype, True, False)
    _check(built, made, dtype, True, _TILES[tile])


def _check(module: ModuleType, made: _Made, dtype: torch.dtype, last: bool, tile: int) -> None:
    y = _like(tuple(made.fwd(torch.float64).shape), dtype, last)
    lists = _at(made.in_idx), _at(made.out_idx), made.per_sample
    rest = (*lists, *made.window, _TYPES[dtype], tile)
    weight = _said(made.weight)
    module.conv_fwd(_said(made.x), _said(y), weight, _at(made.bias), *rest)
    _close(y, made.fwd, "y")
    dy = torch.randn(y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    dx, again = _like(tuple(made.x.shape), dtype, last), None
    covers = module.conv_dgrad(_said(dy), _said(dx), weight, *rest)
    assert covers == (not dx.isnan().any())  # what no tap reaches is left alone, and known
    _close(dx.nan_to_num(), lambda wide: made.dgrad(dy, wide), "dx")
    again = _like(tuple(made.x.shape), dtype, last)
    module.conv_dgrad(_said(dy), _said(again), weight, *rest)
    assert_exact(again, dx, "dx again")


@pytest.mark.parametrize("case", _CASES)
def test_wgrad(emulated: ModuleType, case: str) -> None:
    _check_wgrad(emulated, case, torch.bfloat16, True, "64x64")


@pytest.mark.parametrize("dtype", _CHECKED, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("tile", ["64x64", "128x128"])
def test_wgrad_types(built: ModuleType, dtype: torch.dtype, last: bool, tile: str) -> None:
    for case in ("stride", "many tiles"):
        _check_wgrad(built, case, dtype, last, tile)


def _check_wgrad(module: ModuleType, case: str, dtype: torch.dtype, last: bool, tile: str) -> None:
    made = _Made(case, dtype, last, False)
    dy = _like(tuple(made.fwd(torch.float64).shape), dtype, last)
    dy.copy_(torch.randn(dy.shape))
    (k, c), taps = (dy.shape[1], made.x.shape[1]), list(made.weight.shape[2:])
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]

    def same(wide: torch.dtype) -> Tensor:
        return reference.channel_conv2d_wgrad(dy.to(wide), made.x.to(wide), taps, *made.window, 1)

    for each in (1 << 20, 32, 48):  # 48: splits need not be whole stages
        splits = -(-pixels // each)
        partial = torch.full((splits, k, c * taps[0] * taps[1]), float("nan"))
        dw = torch.full((k, c, *taps), float("nan"), dtype=dtype)
        module.conv_wgrad(
            _said(dy), _said(made.x), _at(partial), taps, *made.window, splits, each,
            _TYPES[dtype], _TILES[tile],
        )  # fmt: skip
        area = taps[0] * taps[1]
        module.conv_reduce(_at(partial), _at(dw), 0, 0, splits, k, c, k, c, area, _TYPES[dtype])
        _close(dw, same, f"dw of {splits} splits")


@pytest.mark.parametrize("gated", ["in", "out", "both"])
def test_wgrad_of_sets_per_sample(built: ModuleType, gated: str) -> None:
    """A split is a sample, its sums go where its own lists say."""
    made = _Made("odd", torch.bfloat16, True, True)
    outs, ins, *taps = made.weight.shape
    in_idx = made.in_idx if gated != "out" else None
    out_idx = made.out_idx if gated != "in" else None
    samples, c, k = made.x.shape[0], made.x.shape[1], made.out_idx.shape[1]
    if in_idx is None:
        ins = c
    if out_idx is None:
        outs = k
    dy = torch.randn(samples, k, *made.x.shape[2:]).bfloat16()
    dy = dy.contiguous(memory_format=torch.channels_last)

    def same(wide: torch.dtype) -> Tensor:
        args = (dy.to(wide), made.x.to(wide), [outs, ins, *taps], in_idx, out_idx)
        return reference.sample_conv2d_wgrad(*args, *made.window)

    partial = torch.full((samples, k, c * taps[0] * taps[1]), float("nan"))
    dw = torch.full((outs, ins, *taps), float("nan"), dtype=torch.bfloat16)
    pixels = dy.shape[2] * dy.shape[3]
    module_args = (_said(dy), _said(made.x), _at(partial), taps, *made.window)
    built.conv_wgrad(*module_args, samples, pixels, 0, _TILES["64x64"])
    out_at, in_at = _places(built, out_idx, outs), _places(built, in_idx, ins)
    sizes = (samples, outs, ins, k, c, taps[0] * taps[1])
    built.conv_reduce(_at(partial), _at(dw), _at(out_at), _at(in_at), *sizes, 0)
    _close(dw, same, "dw")


def _places(module: ModuleType, idx: Tensor | None, channels: int) -> Tensor | None:
    if idx is None:
        return None
    places = torch.full((idx.shape[0], channels), 77, dtype=torch.int32)
    module.conv_invert_lists(_at(idx), _at(places), *idx.shape, channels)
    return places


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lists", ["in", "out", "both"])
def test_pack(built: ModuleType, dtype: torch.dtype, groups: int, lists: str) -> None:
    weight = torch.randn(6, 4, 3, 3).to(dtype)
    out_idx = torch.tensor([0, 2, 3, 5]) if lists != "in" else None
    in_idx = torch.tensor([1, 3] if groups == 1 else [1, 3, 4, 6]) if lists != "out" else None
    truth = reference.pack(weight, out_idx, in_idx, groups, groups)
    packed = torch.full_like(truth, float("nan"))
    k, group_c = packed.shape[:2]
    sizes = (k, k // groups, group_c, 4, 9, dtype.itemsize)
    built.conv_pack(_at(weight), _at(packed), _at(out_idx), _at(in_idx), *sizes)
    assert_exact(packed, truth, "packed")

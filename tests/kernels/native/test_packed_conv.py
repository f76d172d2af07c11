"""Convolution by torch's library on a weight that native code packs, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import native, reference
from tests.tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

if (lacking := native.load("cpu")) is not None:
    pytest.skip(lacking, allow_module_level=True)

_OPS = torch.ops.dcx_native
_WINDOW: tuple[list[int], list[int], list[int]] = ([2, 1], [1, 2], [1, 2])


def _operands(
    groups: int, lists: str, dtype: torch.dtype, taps: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(groups)
    weight, bias = torch.randn(18, 20 // groups, taps, taps), torch.randn(18)
    in_idx = torch.tensor([0, 3, 4, 11, 12, 19]) if lists in ("in", "both") else None
    out_idx = torch.tensor([2, 5, 8, 9, 13, 17]) if lists in ("out", "both") else None
    x = torch.randn(2, 20 if in_idx is None else 6, 7, 8)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), in_idx, out_idx


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lists", ["none", "in", "out", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("taps", [1, 3])
def test_is_the_reference(groups: int, lists: str, dtype: torch.dtype, taps: int) -> None:
    x, weight, bias, in_idx, out_idx = _operands(groups, lists, dtype, taps)

    def run(one: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        args = (in_idx, out_idx, *_WINDOW, groups, groups)
        wide = x.to(one), weight.to(one)
        y = reference.channel_conv2d_fwd(*wide, bias.to(one), *args)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(one)
        dx = reference.channel_conv2d_dgrad(dy, *wide, *args)
        dw = reference.channel_conv2d_wgrad(dy, wide[0], [taps, taps], *_WINDOW, groups)
        return y, dx, dw

    rest = (in_idx, out_idx, *_WINDOW, groups, groups)
    y = _OPS.packed_conv2d_fwd(x, weight, bias, *rest)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
    both = _OPS.packed_conv2d_bwd(dy, x, weight, *rest, True, True)
    names = ("y", "dx", "dw")
    for name, one, same, truth in zip(
        names, (y, *both), run(dtype), run(torch.float64), strict=True
    ):
        assert_close_to_float64(one, same, truth, name)
    dx, none = _OPS.packed_conv2d_bwd(dy, x, weight, *rest, True, False)
    assert_exact(dx, both[0], "dx alone")
    assert none.numel() == 0
    none, dw = _OPS.packed_conv2d_bwd(dy, x, weight, *rest, False, True)
    assert_exact(dw, both[1], "dw alone")
    assert none.numel() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_reruns(threads: int) -> None:
    x, weight, bias, *lists = _operands(1, "both", torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_reruns_equal(lambda: _OPS.packed_conv2d_fwd(x, weight, bias, *lists, *_WINDOW, 1, 1))
    finally:
        torch.set_num_threads(before)


def test_inactive_channels_are_not_read() -> None:
    x, weight, _bias, in_idx, out_idx = _operands(1, "both", torch.float32)
    active = torch.zeros(18, 20, dtype=torch.bool)
    active[out_idx[:, None], in_idx] = True
    weight[~active] = float("nan")
    y = _OPS.packed_conv2d_fwd(x, weight, None, in_idx, out_idx, *_WINDOW, 1, 1)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ((torch.arange(6).int(), None), "expected contiguous 1-D int64 lists"),
        ((torch.tensor([0, 1, 2, 3, 4, 20]), None), "expected in_idx below 20, got 20"),
        ((torch.tensor([0, 1, 2, 3, 4, -1]), None), "expected in_idx below 20, got -1"),
        ((torch.arange(6), torch.tensor([18])), "expected out_idx below 18, got 18"),
        ((torch.arange(5), None), "expected as many channels of x as in_idx has, got 6"),
        ((None, None), "expected all channels of the weight without in_idx, got 6"),
    ],
)
def test_says_what_it_expects(lists: tuple[Tensor | None, Tensor | None], message: str) -> None:
    _, weight, *_ = _operands(1, "both", torch.float32)
    x = torch.randn(2, 6, 7, 8)
    with pytest.raises(RuntimeError, match=message):
        _OPS.packed_conv2d_fwd(x, weight, None, *lists, *_WINDOW, 1, 1)


def test_groups_have_lower_bounds_too() -> None:
    """The numbers of all groups' channels are cut to those of a group; -1 would stay below 0."""
    x, weight, _, in_idx, out_idx = _operands(2, "both", torch.float32)
    assert in_idx is not None
    in_idx[4] = -1
    with pytest.raises(RuntimeError, match=r"expected in_idx below \d+, got -1"):
        _OPS.packed_conv2d_fwd(x, weight, None, in_idx, out_idx, *_WINDOW, 2, 2)


@pytest.mark.parametrize("bias", [torch.zeros(17), torch.zeros(36)[::2], torch.zeros(18, 1)])
def test_refuses_another_bias(bias: Tensor) -> None:
    x, weight, _, *lists = _operands(1, "both", torch.float32)
    with pytest.raises(RuntimeError, match="expected a contiguous bias for every output channel"):
        _OPS.packed_conv2d_fwd(x, weight, bias, *lists, *_WINDOW, 1, 1)


def test_refuses_a_gradient_of_other_channels() -> None:
    x, weight, _, *lists = _operands(1, "both", torch.float32)
    dy = torch.zeros(2, 5, 4, 8)
    with pytest.raises(RuntimeError, match="expected as many channels of dy as out_idx has, got 5"):
        _OPS.packed_conv2d_bwd(dy, x, weight, *lists, *_WINDOW, 1, 1, True, True)

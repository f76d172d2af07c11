"""gather_channels and scatter_channels move bits, and are each other's transpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from channel_helpers import Wanted, channels, leaf, spread
from dcx_kernels import ChannelSet, gather_channels, scatter_channels
from tolerances import assert_exact

SETS: list[tuple[int, Wanted]] = [(1, 1), (3, 3), (17, 1), (63, 17), (100, [0, 99])]
SHAPES = {"NCHW": ((2, 4, 3), 1), "NC": ((3,), 1), "CHW": ((4, 3), 0), "last": ((2, 4), -1)}


def _dense(num_channels: int, rest: tuple[int, ...], dim: int, layout: str) -> Tensor:
    x = torch.randn(num_channels, *rest).movedim(0, dim).contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return spread(x) if layout == "strided" else x


VARIANTS = [
    *((name, "contiguous") for name in SHAPES),
    *((name, "strided") for name in SHAPES),
    ("NCHW", "channels_last"),
]


@pytest.mark.parametrize(("num_channels", "wanted"), SETS)
@pytest.mark.parametrize(("shape", "layout"), VARIANTS)
def test_gather_channels_equals_indexing(
    num_channels: int, wanted: Wanted, shape: str, layout: str
) -> None:
    active = channels(wanted, num_channels)
    rest, dim = SHAPES[shape]
    x = leaf(_dense(num_channels, rest, dim, layout))
    y = gather_channels(x, active, dim)
    assert_exact(y, torch.stack([x.select(dim, c) for c in active.indices.tolist()], dim))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected = torch.zeros(x.shape)
    for position, c in enumerate(active.indices.tolist()):
        expected.select(dim, c).copy_(upstream.select(dim, position))
    assert_exact(x.grad, expected)


@pytest.mark.parametrize(("num_channels", "wanted"), SETS)
@pytest.mark.parametrize(("shape", "layout"), VARIANTS)
def test_scatter_channels_equals_indexing(
    num_channels: int, wanted: Wanted, shape: str, layout: str
) -> None:
    active = channels(wanted, num_channels)
    rest, dim = SHAPES[shape]
    x = leaf(_dense(len(active), rest, dim, layout))
    y = scatter_channels(x, active, dim)
    expected = torch.zeros_like(y)
    for position, c in enumerate(active.indices.tolist()):
        expected.select(dim, c).copy_(x.detach().select(dim, position))
    assert y.shape[dim] == num_channels
    assert_exact(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert_exact(x.grad, torch.stack([upstream.select(dim, c) for c in active.indices], dim))


@pytest.mark.parametrize("function", [gather_channels, scatter_channels])
def test_moves_follow_the_input_layout(function: object) -> None:
    active = ChannelSet([0, 2, 5], 8)
    count = 8 if function is gather_channels else 3
    x = leaf(torch.randn(2, count, 4, 3).contiguous(memory_format=torch.channels_last))
    y = function(x, active)  # type: ignore[operator]
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_moves_take_any_dtype(dtype: torch.dtype) -> None:
    active = ChannelSet([0, 2, 5], 8)
    x = torch.randint(0, 2, (2, 8, 3)).to(dtype)
    y = gather_channels(x, active)
    assert_exact(y, x[:, active.indices])
    mask = active.mask().view(1, 8, 1)
    assert_exact(scatter_channels(y, active), torch.where(mask, x, torch.zeros_like(x)))


@pytest.mark.parametrize("function", [gather_channels, scatter_channels])
def test_moves_gradgradcheck(function: object) -> None:
    active = ChannelSet([0, 2], 3)
    x = leaf(torch.randn(2, 3 if function is gather_channels else 2, 2).double())
    assert torch.autograd.gradcheck(lambda x: function(x, active), x)  # type: ignore[operator]
    assert torch.autograd.gradgradcheck(lambda x: function(x, active), x)  # type: ignore[operator]


def test_moves_refuse_other_counts() -> None:
    active = ChannelSet([0, 2], 3)
    with pytest.raises(ValueError, match="x: expected 3 channels along dim 1, got 2"):
        gather_channels(torch.randn(1, 2, 4), active)
    with pytest.raises(ValueError, match="x: expected 2 active channels along dim 1, got 3"):
        scatter_channels(torch.randn(1, 3, 4), active)
    with pytest.raises(ValueError, match="x: expected 3 channels along dim 0, got 4"):
        gather_channels(torch.randn(4, 3), active, dim=0)

"""Convolution and linear: weights are full with index lists, or packed without.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. "Compact" tensors hold active channels only; index lists are sorted unique
int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels.reference.vectors import per_channel, select
from dcx_kernels.kernels.reference.weights import pack
from dcx_kernels.kernels.window import output_pixels

__all__ = [
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "channel_linear_dgrad",
    "channel_linear_fwd",
    "channel_linear_wgrad",
]


# overloads by name: resolving them anew costs 10 us a call
_convolution_backward = torch.ops.aten.convolution_backward.default


def channel_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
) -> Tensor:
    """Convolve compact x (N, c, H, W) with the active slice of the weight: y (N, k, P, Q).

    ``weight`` (K, C / G, R, S) and ``bias`` (K,) are full, or already packed (k, c / G_act, R, S),
    (k,) when the index lists are None.
    """
    weight = _pack_or_same(weight, out_idx, in_idx, groups, active_groups)
    bias = select(bias, out_idx)
    if x.shape[1] == 0 or weight.shape[0] == 0:
        return _nothing_convolved(x, weight, bias, stride, padding, dilation)
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], active_groups
    )


def _nothing_convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve no channel at all (a slice of which none is active): zeros, or the bias.

    torch's own convolution returns an output of the input's shape there.
    """
    pixels = output_pixels(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = x.new_zeros((x.shape[0], weight.shape[0], *pixels))
    return y if bias is None else y + per_channel(bias, y)


def channel_conv2d_dgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
) -> Tensor:
    """Return dx (N, c, H, W); ``x`` gives shape and layout only."""
    if x.shape[1] == 0 or dy.shape[1] == 0:
        return torch.zeros_like(x)
    weight = _pack_or_same(weight, out_idx, in_idx, groups, active_groups)
    args = (dy, x, weight, None, stride, padding, dilation, False, [0, 0], active_groups)
    dx: Tensor = _convolution_backward(*args, [True, False, False])[0]
    return dx


def channel_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    """Return dw (k, c / G_act, R, S) of the active slice."""
    if x.shape[1] == 0 or dy.shape[1] == 0:
        return x.new_zeros(
            (dy.shape[1], x.shape[1] // active_groups if active_groups else 1, *kernel_size)
        )
    shape = (dy.shape[1], x.shape[1] // active_groups, *kernel_size)
    weight = x.new_empty(shape)  # only its shape is read; a stride of 0 would be made contiguous
    args = (dy, x, weight, None, stride, padding, dilation, False, [0, 0], active_groups)
    dw: Tensor = _convolution_backward(*args, [False, True, False])[1]
    return dw


def channel_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    inner: int,
) -> Tensor:
    """Return x (..., c * inner) times the active slice of weight (K, C * inner)^T, plus bias."""
    weight = _pack_linear(weight, in_idx, out_idx, inner)
    return torch.nn.functional.linear(x, weight, select(bias, out_idx))


def channel_linear_dgrad(
    dy: Tensor, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, inner: int
) -> Tensor:
    """Return dx (..., c * inner)."""
    return dy @ _pack_linear(weight, in_idx, out_idx, inner)


def channel_linear_wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """Return dw (k, c * inner) of the active slice."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _pack_or_same(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    if out_idx is None and in_idx is None:
        return weight
    return pack(weight, out_idx, in_idx, groups, active_groups)


def _pack_linear(
    weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, inner: int
) -> Tensor:
    if out_idx is None and in_idx is None:
        return weight
    per_channel = weight.view(weight.shape[0], -1, inner)
    return pack(per_channel, out_idx, in_idx).flatten(1)

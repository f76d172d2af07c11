"""Launching the convolution kernel: forward and dgrad, with one set for all samples or one each.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. Operands are compact NHWC or NCHW, any strides; outputs have the layout of the
input. Weights are full (K, C / G, R, S) with index lists, or packed without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.layout import empty_alike
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton._conv_launch import ConvLaunch, Lists, same_strides
from dcx_kernels.kernels.triton._geometry import dgrad_axes, fwd_axis
from dcx_kernels.kernels.triton.moments import finish_moments, sum_partials

__all__ = [
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "fused_conv2d_dgrad",
    "fused_conv2d_fwd",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
]


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
    """See `dcx_kernels.kernels.reference`."""
    lists, window = Lists(out_idx, in_idx), (stride, padding, dilation)
    return _forward(x, None, weight, bias, lists, window, active_groups, False)[0]


def sample_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See `dcx_kernels.kernels.reference`: every sample has lists of its own, (N, k), (N, c)."""
    lists, window = Lists(out_idx, in_idx), (stride, padding, dilation)
    return _forward(x, None, weight, bias, lists, window, 1, False)[0]


def fused_conv2d_fwd(
    x: Tensor,
    x_norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve relu(norm(x)), which is never stored, and measure the batch statistics of y.

    Args:
        x_norm: the norm with ReLU that x still has to go through, or None.
        statistics: measure them.

    Returns:
        y (N, k, P, Q), and mean and sum of squared differences, (k,) float32 each, or empty.
    """
    lists, window = Lists(out_idx, in_idx), (stride, padding, dilation)
    if not x.numel():
        args = (x, x_norm, weight, bias, in_idx, out_idx, *window, groups, active_groups)
        return reference.fused_conv2d_fwd(*args, statistics)
    return _forward(x, x_norm, weight, bias, lists, window, active_groups, statistics)


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
    """See `dcx_kernels.kernels.reference`."""
    lists, window = Lists(out_idx, in_idx), (stride, padding, dilation)
    return _backward(dy, None, x, None, weight, lists, window, active_groups, False)[0]


def sample_conv2d_dgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See `dcx_kernels.kernels.reference`."""
    lists, window = Lists(out_idx, in_idx), (stride, padding, dilation)
    return _backward(dy, None, x, None, weight, lists, window, 1, False)[0]


def fused_conv2d_dgrad(
    dy: Tensor,
    dy_grad: NormGrad | None,
    x: Tensor,
    x_norm: Norm | None,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `fused_conv2d_fwd`, ReLU and scale of the norms on both sides included.

    Args:
        dy_grad: what turns ``dy`` into the gradient of the convolution's output, or None.
        x_norm: the norm of x in the forward pass.
        per_sample: reduce over pixels only.

    Returns:
        dx, and the gradients of scale and shift of ``x_norm``, (c,) or (N, c) float32, or empty.
    """
    lists, window = Lists(out_idx, in_idx), (stride, padding, dilation)
    args = (dy, dy_grad, x, x_norm, weight, lists, window, active_groups, per_sample)
    return _backward(*args)


# --- from tensors to launches ---------------------------------------------------------------------

_Window = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _forward(
    x: Tensor,
    x_norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    lists: Lists,
    window: _Window,
    active_groups: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    filters = weight.shape[2:]
    vertical, horizontal = (
        fwd_axis(*one) for one in zip(x.shape[2:], filters, *window, strict=True)
    )
    num_out = weight.shape[0] if lists.out is None else lists.out.shape[-1]
    shape = (x.shape[0], num_out, vertical.size, horizontal.size)
    y = empty_alike(shape, like=x)
    mean, m2 = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    if not y.numel() or not x.shape[1]:
        return _of_no_channel(y, bias, lists.out), mean, m2
    launch = ConvLaunch(x, weight, y, lists, active_groups, False, [(vertical, horizontal)])
    launch.bias = bias
    if x_norm is not None:
        launch.activate(x_norm)
    moments = launch.measure() if statistics else None
    launch()
    if moments is not None:
        mean, m2 = finish_moments(moments, y.numel() // num_out, launch.tile.rows)
    return y, mean, m2


def _of_no_channel(y: Tensor, bias: Tensor | None, out_idx: Tensor | None) -> Tensor:
    """Convolve no input channel at all: the bias."""
    y.zero_()
    if bias is None or not y.numel():
        return y
    if out_idx is None:
        return y.add_(bias.view(1, -1, 1, 1))
    chosen = bias[out_idx]
    return y.add_(chosen.view(*([1] if out_idx.dim() == 1 else []), *chosen.shape, 1, 1))


def _backward(
    dy: Tensor,
    dy_grad: NormGrad | None,
    x: Tensor,
    x_norm: Norm | None,
    weight: Tensor,
    lists: Lists,
    window: _Window,
    active_groups: int,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    filters = weight.shape[2:]
    ways = [dgrad_axes(*one) for one in zip(x.shape[2:], filters, *window, strict=True)]
    phases = [(vertical, horizontal) for vertical in ways[0] for horizontal in ways[1]]
    reached = sum(vertical.size * horizontal.size for vertical, horizontal in phases)
    computed = bool(x.numel() and dy.numel() and phases)
    everywhere = computed and reached == x.shape[2] * x.shape[3]
    dx = torch.empty_like(x) if everywhere else torch.zeros_like(x)
    sums = (x.shape[0], x.shape[1]) if per_sample else (x.shape[1],)
    dscale, dshift = (
        x.new_zeros(sums if x_norm is not None else 0, dtype=torch.float32) for _ in range(2)
    )
    if not computed:
        return dx, dscale, dshift
    launch = ConvLaunch(dy, weight, dx, lists, active_groups, True, phases, per_sample)
    if dy_grad is not None:
        launch.undo(dy_grad)
    partial = None if x_norm is None else launch.mask(same_strides(x, dx)[0], x_norm)
    launch()
    if partial is not None:
        dscale, dshift = (part.reshape(sums) for part in sum_partials(partial).unbind(1))
    return dx, dscale, dshift

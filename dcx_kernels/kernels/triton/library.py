"""Convolution by cuDNN on packed weights, as they are or with channels rounded up.

cuDNN's tensor-core kernels want channel counts of whole 16-byte vectors. Filling up with zeros
changes no result: a zero channel adds nothing, and output channels that are added are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.layout import layout

__all__ = ["padded_conv2d_dgrad", "padded_conv2d_fwd", "padded_conv2d_wgrad"]


def padded_conv2d_fwd(
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
    """See `dcx_kernels.kernels.reference.channel_conv2d_fwd`; one group only is filled up."""
    weight = _packed(weight, out_idx, in_idx, groups, active_groups)
    bias = bias if bias is None or out_idx is None else bias.index_select(0, out_idx)
    num_out, window = weight.shape[0], (stride, padding, dilation)
    if active_groups == 1:
        weight, x = _filled(_filled(weight, 0), 1), _filled(x, 1)
        bias = None if bias is None else _filled(bias, 0, weight.element_size())
    y = reference.channel_conv2d_fwd(
        x, weight, bias, None, None, *window, active_groups, active_groups
    )
    return _cut(y, num_out)


def padded_conv2d_dgrad(
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
    """See `dcx_kernels.kernels.reference.channel_conv2d_dgrad`."""
    weight = _packed(weight, out_idx, in_idx, groups, active_groups)
    num_in, window = x.shape[1], (stride, padding, dilation)
    if active_groups == 1:
        weight, dy, x = _filled(_filled(weight, 0), 1), _filled(dy, 1), _filled(x, 1)
    dx = reference.channel_conv2d_dgrad(
        dy, x, weight, None, None, *window, active_groups, active_groups
    )
    return _cut(dx, num_in)


def padded_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    """See `dcx_kernels.kernels.reference.channel_conv2d_wgrad`."""
    shape = dy.shape[1], x.shape[1]
    if active_groups != 1:
        return reference.channel_conv2d_wgrad(
            dy, x, kernel_size, stride, padding, dilation, active_groups
        )
    dy, x = _filled(dy, 1), _filled(x, 1)
    dw = reference.channel_conv2d_wgrad(dy, x, kernel_size, stride, padding, dilation, 1)
    return dw[: shape[0], : shape[1]].contiguous()


def _packed(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    if out_idx is None and in_idx is None:
        return weight
    return reference.pack(weight, out_idx, in_idx, groups, active_groups)


def _filled(x: Tensor, dim: int, itemsize: int = 0) -> Tensor:
    """Add zeros along ``dim`` up to the next 16 bytes, of elements of ``itemsize`` bytes."""
    missing = -x.shape[dim] % (16 // (itemsize or x.element_size()))
    if not missing:
        return x
    widths = [0, 0] * (x.dim() - 1 - dim) + [0, missing]
    return F.pad(x, widths)


def _cut(x: Tensor, channels: int) -> Tensor:
    """Keep the first channels, in the layout that x has."""
    if x.shape[1] == channels:
        return x
    return x[:, :channels].contiguous(memory_format=layout(x))

"""Fused convolutions of the Triton backend: our kernels, whatever the widths.

cuDNN cannot apply a norm to what it loads, and measure what it stores, at channel counts that
change with every step. float64 goes to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton import convolution, norm_act
from dcx_kernels.kernels.triton.conv_wgrad import channel_conv2d_wgrad

__all__ = [
    "fused_conv2d_dgrad",
    "fused_conv2d_fwd",
    "fused_conv2d_wgrad",
    "norm_act_bwd",
    "norm_act_fwd",
]


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
    """See `dcx_kernels.kernels.reference.fused_conv2d_fwd`."""
    window = (stride, padding, dilation, groups, active_groups)
    args = (x, x_norm, weight, bias, in_idx, out_idx, *window, statistics)
    if x.dtype == torch.float64 or not x.numel():
        return reference.fused_conv2d_fwd(*args)
    return convolution.fused_conv2d_fwd(*args)


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
    """See `dcx_kernels.kernels.reference.fused_conv2d_dgrad`."""
    window = (stride, padding, dilation, groups, active_groups)
    args = (dy, dy_grad, x, x_norm, weight, in_idx, out_idx, *window, per_sample)
    if x.dtype == torch.float64:
        return reference.fused_conv2d_dgrad(*args)
    return convolution.fused_conv2d_dgrad(*args)


def fused_conv2d_wgrad(
    dy: Tensor,
    dy_grad: NormGrad | None,
    x: Tensor,
    x_norm: Norm | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    """See `dcx_kernels.kernels.reference.fused_conv2d_wgrad`."""
    window = (kernel_size, stride, padding, dilation, active_groups)
    if x.dtype == torch.float64:
        return reference.fused_conv2d_wgrad(dy, dy_grad, x, x_norm, *window)
    return channel_conv2d_wgrad(dy, x, *window, x_norm=x_norm, dy_grad=dy_grad)


def norm_act_fwd(y: Tensor, norm: Norm, relu: bool) -> Tensor:
    """See `dcx_kernels.kernels.reference.norm_act_fwd`."""
    if y.dtype == torch.float64:
        return reference.norm_act_fwd(y, norm, relu)
    return norm_act.norm_act_fwd(y, norm, relu)


def norm_act_bwd(
    dz: Tensor, y: Tensor, norm: Norm, relu: bool, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """See `dcx_kernels.kernels.reference.norm_act_bwd`."""
    if y.dtype == torch.float64:
        return reference.norm_act_bwd(dz, y, norm, relu, per_sample)
    return norm_act.norm_act_bwd(dz, y, norm, relu, per_sample)

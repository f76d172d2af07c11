"""Fused convolutions of the Triton backend: our kernels, whatever the widths.

cuDNN cannot apply a norm to what it loads, and measure what it stores, at channel counts that
change with every step. For the functions see `dcx_kernels.kernels.reference`, which serves float64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton import conv_wgrad, convolution, norm_act
from dcx_kernels.kernels.triton._launch import unless_float64

__all__ = [
    "fused_conv2d_dgrad",
    "fused_conv2d_fwd",
    "fused_conv2d_wgrad",
    "norm_act_bwd",
    "norm_act_fwd",
]

fused_conv2d_fwd = unless_float64(convolution.fused_conv2d_fwd, reference.fused_conv2d_fwd)
fused_conv2d_dgrad = unless_float64(convolution.fused_conv2d_dgrad, reference.fused_conv2d_dgrad)
norm_act_fwd = unless_float64(norm_act.norm_act_fwd, reference.norm_act_fwd)
norm_act_bwd = unless_float64(norm_act.norm_act_bwd, reference.norm_act_bwd)


def fused_conv2d_wgrad(
    dy: Tensor, dy_grad: NormGrad | None, x: Tensor, x_norm: Norm | None, *window: Any
) -> Tensor:
    """See `dcx_kernels.kernels.reference.fused_conv2d_wgrad`."""
    return conv_wgrad.channel_conv2d_wgrad(dy, x, *window, x_norm=x_norm, dy_grad=dy_grad)

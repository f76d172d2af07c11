"""Convolution on a GPU by whatever `choice` says.

Where every sample has channels of its own, no library competes: one filter a sample makes a grouped
convolution of it, which is slow everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton import conv_wgrad, convolution, library
from dcx_kernels.kernels.triton._launch import unless_float64
from dcx_kernels.kernels.triton.choice import implementation

__all__ = [
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
]

_FWD = {
    "own": convolution.channel_conv2d_fwd,
    "library": reference.channel_conv2d_fwd,
    "padded": library.padded_conv2d_fwd,
}
_DGRAD = {
    "own": convolution.channel_conv2d_dgrad,
    "library": reference.channel_conv2d_dgrad,
    "padded": library.padded_conv2d_dgrad,
}
_WGRAD = {
    "own": conv_wgrad.channel_conv2d_wgrad,
    "library": reference.channel_conv2d_wgrad,
    "padded": library.padded_conv2d_wgrad,
}


def channel_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """See `dcx_kernels.kernels.reference`."""
    num_out = weight.shape[0] if out_idx is None else out_idx.shape[0]
    way = _way("fwd", x, weight, x.shape[1], num_out, geometry[-1])
    return _FWD[way](x, weight, bias, in_idx, out_idx, *geometry)


def channel_conv2d_dgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """See `dcx_kernels.kernels.reference`."""
    way = _way("dgrad", dy, weight, x.shape[1], dy.shape[1], geometry[-1])
    return _DGRAD[way](dy, x, weight, in_idx, out_idx, *geometry)


def channel_conv2d_wgrad(
    dy: Tensor, x: Tensor, kernel_size: Sequence[int], *geometry: Any
) -> Tensor:
    """See `dcx_kernels.kernels.reference`."""
    way = _way("wgrad", dy, x, x.shape[1], dy.shape[1], geometry[-1])
    return _WGRAD[way](dy, x, kernel_size, *geometry)


def _way(which: Any, a: Tensor, b: Tensor, num_in: int, num_out: int, groups: int) -> str:
    if a.dtype != b.dtype:
        return "library"  # which refuses, in torch's words
    return implementation(which, a.dtype, num_in, num_out, groups)


sample_conv2d_fwd = unless_float64(convolution.sample_conv2d_fwd, reference.sample_conv2d_fwd)
sample_conv2d_dgrad = unless_float64(convolution.sample_conv2d_dgrad, reference.sample_conv2d_dgrad)
sample_conv2d_wgrad = conv_wgrad.sample_conv2d_wgrad

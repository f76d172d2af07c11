"""Convolution in which every sample has active channels of its own: only the winners are computed.

The weight is read where it lies, in the full filter; no sample gets a copy of its slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels.layout import empty_alike
from dcx_kernels.kernels.reference import sample_convolution as reference
from dcx_kernels.kernels.window import output_pixels

__all__ = ["sample_conv2d_dgrad", "sample_conv2d_fwd", "sample_conv2d_wgrad"]


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
    """Convolve x (N, c, H, W), each sample with its slice of the weight: y (N, k, P, Q).

    ``weight`` (K, C, R, S) and ``bias`` (K,) are full.
    """
    window = list(stride), list(padding), list(dilation)
    if not _knows(x, weight, bias):
        return reference.sample_conv2d_fwd(x, weight, bias, in_idx, out_idx, *window)
    pixels = output_pixels(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    channels = weight.shape[0] if out_idx is None else out_idx.shape[1]
    y = empty_alike((x.shape[0], channels, *pixels), like=x)
    biases = None if bias is None else bias.contiguous()
    lists = _rows(in_idx), _rows(out_idx)
    torch.ops.dcx_native.sample_conv2d_fwd(y, x, weight, biases, *lists, *window)
    return y


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
    """Return dx (N, c, H, W); ``x`` gives shape and layout only."""
    window = list(stride), list(padding), list(dilation)
    if not _knows(dy, x, weight):
        return reference.sample_conv2d_dgrad(dy, x, weight, in_idx, out_idx, *window)
    dx = empty_alike(x.shape, like=x)
    lists = _rows(in_idx), _rows(out_idx)
    torch.ops.dcx_native.sample_conv2d_dgrad(dx, dy, weight, *lists, *window)
    return dx


def sample_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the full dw (K, C, R, S), summed over samples; zeros where no sample has the pair."""
    window = list(stride), list(padding), list(dilation)
    if not _knows(dy, x):
        return reference.sample_conv2d_wgrad(dy, x, weight_shape, in_idx, out_idx, *window)
    dw = x.new_zeros(list(weight_shape))
    lists = _rows(in_idx), _rows(out_idx)
    torch.ops.dcx_native.sample_conv2d_wgrad(dw, dy, x, *lists, *window)
    return dw


def _knows(first: Tensor, *others: Tensor | None) -> bool:
    """Tell whether native code serves these: float32 or float64, all alike."""
    if first.dtype not in (torch.float32, torch.float64):
        return False
    return all(tensor is None or tensor.dtype == first.dtype for tensor in others)


def _rows(idx: Tensor | None) -> Tensor | None:
    return None if idx is None else idx.contiguous()

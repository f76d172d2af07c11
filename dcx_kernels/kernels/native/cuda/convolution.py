"""Convolutions on a GPU: our kernel on the full weight, or torch's library on a packed one.

``own`` reads weights through index lists and takes any width as it is; ``packed`` copies the active
slice of the weight, a few hundred kilobytes, and leaves the rest to cuDNN, in one operator call.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.layout import empty_alike
from dcx_kernels.kernels.window import output_pixels

__all__ = [
    "SOURCE",
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "implementation",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
]

Implementation = Literal["own", "packed", "reference"]
_Pass = Literal["fwd", "dgrad", "wgrad"]
_Width = Literal["aligned", "odd"]

SOURCE = "not measured on a GPU yet: cuDNN for widths of whole 16-byte vectors, our kernel for odd"
_TABLE: dict[_Width, dict[_Pass, Implementation]] = {
    "aligned": {"fwd": "packed", "dgrad": "packed", "wgrad": "packed"},
    "odd": {"fwd": "own", "dgrad": "own", "wgrad": "own"},
}
_OWN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST = 2**31 - 1  # pixels and entries of a filter that the kernel counts in 32 bits
_MOST_SAMPLES = 65535  # with sets of their own: blocks along one axis of a grid


def implementation(
    which: _Pass, dtype: torch.dtype, num_in: int, num_out: int, groups: int
) -> Implementation:
    """Return what convolves ``num_in`` (c) channels into ``num_out`` (k) in active ``groups``."""
    if num_in == 0 or num_out == 0 or groups == 0:
        return "reference"
    if not _has_kernel(dtype) or groups > 1:
        return "packed"
    vector = 16 // dtype.itemsize
    aligned = num_in % vector == 0 and num_out % vector == 0
    return _TABLE["aligned" if aligned else "odd"][which]


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
    """Convolve compact x (N, c, H, W) with the active slice: see `reference.channel_conv2d_fwd`."""
    window = list(stride), list(padding), list(dilation)
    num_out = (weight if out_idx is None else out_idx).shape[0]
    args = (x, weight, bias, in_idx, out_idx)
    which = _chosen("fwd", x, num_out, weight, bias, active_groups)
    if which == "reference":
        return reference.channel_conv2d_fwd(*args, *window, groups, active_groups)
    if which == "packed":
        y: Tensor = torch.ops.dcx_native.packed_conv2d_fwd(*args, *window, groups, active_groups)
        return y
    y = _result(x, weight, num_out, window)
    torch.ops.dcx_native.channel_conv2d_fwd(y, *args, *window)
    return y


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
    window = list(stride), list(padding), list(dilation)
    lists = in_idx, out_idx
    which = _chosen("dgrad", x, dy.shape[1], weight, dy, active_groups)
    if which == "reference":
        args = (dy, x, weight, *lists, *window, groups, active_groups)
        return reference.channel_conv2d_dgrad(*args)
    if which == "packed":
        args = (dy, x, weight, *lists, *window, groups, active_groups)
        dx: Tensor = torch.ops.dcx_native.packed_conv2d_bwd(*args, True, False)[0]
        return dx
    dx = empty_alike(x.shape, like=x)
    torch.ops.dcx_native.channel_conv2d_dgrad(dx, dy, weight, *lists, *window)
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
    window = list(stride), list(padding), list(dilation)
    which = _chosen("wgrad", x, dy.shape[1], None, dy, active_groups)
    if which != "own":  # nothing to pack
        return reference.channel_conv2d_wgrad(dy, x, kernel_size, *window, active_groups)
    dw = x.new_empty((dy.shape[1], x.shape[1], *kernel_size))
    torch.ops.dcx_native.channel_conv2d_wgrad(dw, dy, x, *window)
    return dw


# --- one set of channels for each sample: our kernel wherever it can ------------------------------


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
    """Convolve every sample with its slice: see `reference.sample_conv2d_fwd`."""
    window = list(stride), list(padding), list(dilation)
    num_out = weight.shape[0] if out_idx is None else out_idx.shape[1]
    lists = _rows(in_idx), _rows(out_idx)
    if not _serves(x, num_out, weight, bias) or len(x) > _MOST_SAMPLES:
        return reference.sample_conv2d_fwd(x, weight, bias, *lists, *window)
    y = _result(x, weight, num_out, window)
    if y.numel():
        torch.ops.dcx_native.sample_conv2d_fwd(y, x, weight, bias, *lists, *window)
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
    lists = _rows(in_idx), _rows(out_idx)
    if not _serves(x, dy.shape[1], weight, dy) or len(x) > _MOST_SAMPLES or not dy.numel():
        return reference.sample_conv2d_dgrad(dy, x, weight, *lists, *window)
    dx = empty_alike(x.shape, like=x)
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
    lists = _rows(in_idx), _rows(out_idx)
    if not _serves(x, dy.shape[1], None, dy) or len(x) > _MOST_SAMPLES or not dy.numel():
        return reference.sample_conv2d_wgrad(dy, x, weight_shape, *lists, *window)
    dw = x.new_empty(list(weight_shape))
    torch.ops.dcx_native.sample_conv2d_wgrad(dw, dy, x, *lists, *window)
    return dw


# --- rules ----------------------------------------------------------------------------------------


def _chosen(
    which: _Pass,
    x: Tensor,
    num_out: int,
    weight: Tensor | None,
    other: Tensor | None,
    active_groups: int,
) -> Implementation:
    alike = all(one is None or one.dtype == x.dtype for one in (weight, other))
    plain = (weight is None or weight.is_contiguous()) and _flat(other)
    if not x.numel() or not alike or not plain or not (other is None or other.numel()):
        return "reference"
    chosen = implementation(which, x.dtype, x.shape[1], num_out, active_groups)
    if chosen == "own" and not _serves(x, num_out, weight, other):
        return "packed"
    return chosen


def _has_kernel(dtype: torch.dtype) -> bool:
    """Tell whether tensor cores take ``dtype``: fp32 as TF32, where convolutions may use it."""
    return dtype in _OWN_DTYPES and (dtype != torch.float32 or torch.backends.cudnn.allow_tf32)


def _serves(x: Tensor, num_out: int, weight: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether our kernel computes this at all."""
    alike = all(one is None or one.dtype == x.dtype for one in (weight, other))
    whole = weight is None or (weight.is_contiguous() and weight.numel() <= _MOST)
    filled = x.numel() > 0 and num_out > 0
    small = x.numel() <= _MOST and (other is None or other.numel() <= _MOST)
    return _has_kernel(x.dtype) and alike and whole and _flat(other) and filled and small


def _flat(other: Tensor | None) -> bool:
    """Tell whether a bias is contiguous; images may have any strides."""
    return other is None or other.dim() != 1 or other.is_contiguous()


def _result(
    x: Tensor, weight: Tensor, num_out: int, window: tuple[list[int], list[int], list[int]]
) -> Tensor:
    pixels = output_pixels(x.shape[2:], weight.shape[2:], *window)
    return empty_alike((x.shape[0], num_out, *pixels), like=x)


def _rows(idx: Tensor | None) -> Tensor | None:
    return None if idx is None else idx.contiguous()

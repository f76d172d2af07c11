"""The sum of two compact tensors over the union of their channels."""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.layout import layout

__all__ = ["union_add"]


def union_add(a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int) -> Tensor:
    """Add a (N, a, ...) and b (N, b, ...) at their places among ``num_out`` channels.

    NCHW: whole planes are copied and added. NHWC: planes are strided, so that each term is spread
    over the sum's channels by a selection instead (twice as fast on a CPU).
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    if a_idx.shape[0] < b_idx.shape[0]:
        a, b, a_idx, b_idx = b, a, b_idx, a_idx
    if torch.channels_last in (layout(a), layout(b)):
        total = _spread(a, a_idx, num_out) + _spread(b, b_idx, num_out)
        return total.contiguous(memory_format=torch.channels_last)
    if a_idx.shape[0] == num_out:
        y = a.to(dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        y = a.new_zeros((a.shape[0], num_out, *a.shape[2:]), dtype=dtype)
        y.index_copy_(1, a_idx, a.to(dtype))
    if b_idx.shape[0] == num_out:
        return y.add_(b)
    return y.index_add_(1, b_idx, b.to(dtype))


def _spread(x: Tensor, idx: Tensor, num_out: int) -> Tensor:
    """Return x (N, c, H, W) with zeros between its channels: NHWC, (N, num_out, H, W)."""
    n, c, h, w = x.shape
    if c == num_out:
        return x
    from_ = idx.new_full((num_out,), c).index_copy_(0, idx, torch.arange(c, device=idx.device))
    rows = torch.nn.functional.pad(x.permute(0, 2, 3, 1).reshape(n * h * w, c), (0, 1))
    return rows.index_select(1, from_).view(n, h, w, num_out).permute(0, 3, 1, 2)

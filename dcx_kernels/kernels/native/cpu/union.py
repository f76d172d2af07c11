"""The sum of two compact tensors over the union of their channels, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.layout import layout
from dcx_kernels.kernels.reference import union as reference

__all__ = ["union_add"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def union_add(a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int) -> Tensor:
    """Add a (N, a, ...) and b (N, b, ...) at their places among ``num_out`` channels.

    The result is channels_last if a term is. A term may have no channels, or be the first channels
    of a wider buffer.
    """
    if not a.shape[1] or not b.shape[1]:
        return _one_term(a, b)
    if not _knows(a, b):
        return reference.union_add(a, b, a_idx, b_idx, num_out)
    y: Tensor = torch.ops.dcx_native.union_add.default(a, b, a_idx, b_idx, num_out)
    return y


def _knows(a: Tensor, b: Tensor) -> bool:
    return a.dtype in _DTYPES and a.dtype == b.dtype and a.numel() > 0


def _one_term(a: Tensor, b: Tensor) -> Tensor:
    """Copy the other one: the terms cover all channels together."""
    term = b if b.shape[1] else a
    last = torch.channels_last in (layout(a), layout(b))
    form = torch.channels_last if last else torch.contiguous_format
    return term.to(torch.promote_types(a.dtype, b.dtype), copy=True, memory_format=form)

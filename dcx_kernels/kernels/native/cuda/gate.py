"""The winners of each sample in one launch: a block a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import gate as reference

__all__ = ["k_winners"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST = 2**31 - 2**11  # samples, channels: kernels number them in int32


def k_winners(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the channels of the k greatest g of each sample, ascending, and g there.

    See `reference.gate`: exactly k, ties go to the lower channel, NaN counts as -inf.

    Shape:
        g: (N, C) floating, any strides -> (N, k) int64, (N, k) of g's dtype.
    """
    if not _knows(g, k):
        return reference.k_winners(g, k)
    winners: tuple[Tensor, Tensor] = torch.ops.dcx_native.k_winners(g.detach(), k)
    return winners


def _knows(g: Tensor, k: int) -> bool:
    """Whether the kernel chooses, rather than the reference."""
    fits = max(g.shape) < _MOST and 0 <= k <= g.shape[1]
    return _serves(g.device) and g.dtype in _DTYPES and fits


def _serves(device: torch.device) -> bool:
    return device.type == "cuda"

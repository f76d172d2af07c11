"""The winners of each sample: a program a sample finds the least winner, then lists them all.

Legend: N batch, C channels, k winners of a sample.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.reference import gate as reference
from dcx_kernels.kernels.triton._launch import kernel, on
from dcx_kernels.kernels.triton.selection import nth_greatest, order_key

__all__ = ["k_winners"]


@kernel()
def _k_winners_fwd_kernel(
    g_ptr, indices_ptr, values_ptr, C, k, stride_n, stride_c, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    g_ptr += n * stride_n
    indices_ptr += n * k
    values_ptr += n * k
    last, ties = nth_greatest(g_ptr, stride_c, C, k, 32, True, BLOCK)
    equals, winners = 0, 0
    for at in range(0, C, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        inside = channel < C
        g = tl.load(g_ptr + channel * stride_c, mask=inside, other=0)
        key = order_key(g.to(tl.float32), 32)
        equal = ((key == last) & inside).to(tl.int32)
        tied = (equal == 1) & (equals + tl.cumsum(equal, 0) <= ties)
        won = inside & ((key > last) | tied)
        nth = winners + tl.cumsum(won.to(tl.int32), 0) - 1
        tl.store(indices_ptr + nth, channel.to(tl.int64), mask=won)
        tl.store(values_ptr + nth, g, mask=won)
        equals += tl.sum(equal)
        winners += tl.sum(won.to(tl.int32))


def _tile(channels: int) -> tuple[int, int]:
    """Return channels of a block, more than which are looped over, and warps."""
    if channels <= 256:
        return 256, 2
    return (1024, 4) if channels <= 1024 else (4096, 16)


def k_winners(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the channels of the k greatest g of each sample, ascending, and g there.

    Exactly k: ties go to the lower channel, and NaN counts as -inf (but is returned as NaN).

    Shape:
        g: (N, C) floating, any strides -> (N, k) int64, (N, k) of g's dtype.
    """
    if g.dtype == torch.float64:
        return reference.k_winners(g, k)
    n, channels = g.shape
    indices = torch.empty((n, k), dtype=torch.int64, device=g.device)
    values = torch.empty((n, k), dtype=g.dtype, device=g.device)
    if n:
        block, warps = _tile(channels)
        with on(g):
            _k_winners_fwd_kernel[(n,)](
                g, indices, values, channels, k, *g.stride(), BLOCK=block, num_warps=warps
            )
    return indices, values

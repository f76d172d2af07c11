"""Sums of the partial gradients of a convolution's weight, always in the same order.

Legend: K out and C in channels of the weight, ``k`` and ``c`` of a partial, a tap is r * S + s.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.triton._launch import cdiv, kernel
from dcx_kernels.kernels.triton._math import cast

__all__ = ["positions", "sum_partials"]

_BLOCK = 256  # entries of a program


@kernel("partial_ptr", "out_ptr")
def _sum_wgrad_kernel(
    partial_ptr,  # (segments, parts, k, c, taps)
    sum_ptr,  # what is there already
    out_ptr,  # (K, C, taps)
    out_position_ptr,  # (segments of all, K): places in k, or -1
    in_position_ptr,
    first, segments, parts,
    K, C, k, c, taps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < K * C * taps
    out_channel, in_channel, tap = entry // (C * taps), entry // taps % C, entry % taps
    if sum_ptr is not None:
        total = tl.load(sum_ptr + entry, mask=inside, other=0.0)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, segments * parts, loop_unroll_factor=8):
        row, column, segment = out_channel, in_channel, first + split // parts
        there = inside
        if out_position_ptr is not None:
            row = tl.load(out_position_ptr + segment * K + row, mask=inside, other=-1)
            there = there & (row >= 0)
        if in_position_ptr is not None:
            column = tl.load(in_position_ptr + segment * C + column, mask=inside, other=-1)
            there = there & (column >= 0)
        at = (row * c + column) * taps + tap
        total += tl.load(partial_ptr + at, mask=there, other=0.0)
        partial_ptr += k * c * taps
    tl.store(out_ptr + entry, cast(total, out_ptr.dtype.element_ty), mask=inside)


@kernel()
def _positions_kernel(idx_ptr, position_ptr, entries, count, channels, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    channel = tl.load(idx_ptr + entry, mask=inside, other=0)
    tl.store(position_ptr + entry // count * channels + channel, entry % count, mask=inside)


def positions(idx: Tensor | None, channels: int) -> Tensor | None:
    """Invert index lists: where every channel stands in its sample's list.

    Args:
        idx: (N, count) int64, unique within a sample; None stays None.
        channels: how many there are.

    Returns:
        (N, channels) int32, -1 where a channel is absent.
    """
    if idx is None:
        return None
    idx = idx.contiguous()
    position = idx.new_full((idx.shape[0], channels), -1, dtype=torch.int32)
    grid = (cdiv(idx.numel(), _BLOCK),)
    _positions_kernel[grid](idx, position, idx.numel(), idx.shape[1], channels, BLOCK=_BLOCK)
    return position


def sum_partials(
    partial: Tensor,
    out: Tensor,
    before: Tensor | None = None,
    out_position: Tensor | None = None,
    in_position: Tensor | None = None,
    first: int = 0,
) -> None:
    """Write the sum of partials, rounded once, into ``out``; also what ``before`` holds.

    Args:
        partial: (segments, parts, k, c, R * S) float32; a segment is a sample if there are
            positions.
        out: (K, C, R, S), contiguous.
        before: like ``out``, float32; may be ``out`` itself.
        out_position: of all samples, from `positions`; None: k is K.
        in_position: likewise; None: c is C.
        first: the sample of segment 0.
    """
    segments, parts, k, c, taps = partial.shape
    K, C = out.shape[:2]
    _sum_wgrad_kernel[(cdiv(out.numel(), _BLOCK),)](
        partial, before, out, out_position, in_position,
        first, segments, parts, K, C, k, c, taps, BLOCK=_BLOCK,
    )  # fmt: skip

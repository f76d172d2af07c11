"""The global top-k over the channels of all groups in three launches, nothing read by the host.

Scores become unsigned integers of the same order. (1) A program a group finds its ``min_active``
best and lifts their keys above all others. (2) One program finds the last channel that the budget
reaches: 8 bits a pass, by histograms of keys that stay in the cache; for the few thousand to
hundred thousand channels of a network that is shorter than the passes of a device-wide sort, and
integer counts do not depend on the order of threads. (3) A program a group writes its list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.reference.selection import group_places
from dcx_kernels.kernels.triton._launch import kernel, on

__all__ = ["nth_greatest", "order_key", "select_channels"]

_GROUP_BLOCK, _GROUP_WARPS = 1024, 4
_TOTAL_BLOCK, _TOTAL_WARPS = 4096, 32


@triton.jit
def order_key(score, BITS: tl.constexpr):
    """Return unsigned keys in the order of ``score``: NaN as -inf, -0 as 0; no key is 0 or ~0."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)
    if BITS == 64:
        bits = score.to(tl.int64, bitcast=True)
        key = (bits ^ ((bits >> 63) | -(1 << 63))).to(tl.uint64, bitcast=True)
    else:
        bits = score.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | -(1 << 31))).to(tl.uint32, bitcast=True)
    return key


@triton.jit
def _load_keys(ptr, offsets, stride, inside, BITS: tl.constexpr, RAW: tl.constexpr):
    """Load keys, or with RAW scores and make them keys; 0 outside."""
    found = tl.load(ptr + offsets * stride, mask=inside, other=0)
    if RAW:
        key = order_key(found.to(tl.float64 if BITS == 64 else tl.float32), BITS)
        key = tl.where(inside, key, 0)
    else:
        key = found.to(tl.uint64 if BITS == 64 else tl.uint32, bitcast=True)
    return key


@triton.jit
def nth_greatest(
    ptr, stride, count, nth, BITS: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the key of the ``nth`` greatest of ``count``, and how many that equal it are in."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((), 0, tl.uint64 if BITS == 64 else tl.uint32)
    if nth == 1:  # one pass
        for at in range(0, count, BLOCK):
            key = _load_keys(ptr, at + lane, stride, at + lane < count, BITS, RAW)
            found = tl.maximum(found, tl.max(key, 0))
    else:
        bins = tl.arange(0, 256)
        for step in range(BITS // 8):
            shift = BITS - 8 - 8 * step
            totals = tl.zeros((256,), tl.int32)
            for at in range(0, count, BLOCK):
                inside = at + lane < count
                key = _load_keys(ptr, at + lane, stride, inside, BITS, RAW)
                # in two steps: a shift by all bits is undefined
                same = (((key ^ found) >> shift) >> 8) == 0
                digit = ((key >> shift) & 255).to(tl.int32)
                totals += tl.histogram(digit, 256, mask=inside & same)
            reached = tl.cumsum(totals, 0, reverse=True)
            best = tl.sum((reached >= nth).to(tl.int32)) - 1
            nth -= tl.sum(tl.where(bins > best, totals, 0))
            found |= best.to(found.dtype) << shift
    return found, nth


@kernel()
def _select_channels_force_kernel(
    scores_ptr, bounds_ptr, keys_ptr, min_active, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.load(bounds_ptr + tl.program_id(0)).to(tl.int32)
    size = tl.load(bounds_ptr + tl.program_id(0) + 1).to(tl.int32) - first
    floor = tl.minimum(min_active, size)
    last, ties = nth_greatest(scores_ptr + first, 1, size, floor, BITS, True, BLOCK)
    seen = 0
    for at in range(0, size, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < size
        key = _load_keys(scores_ptr + first, offsets, 1, inside, BITS, True)
        equal = ((key == last) & inside).to(tl.int32)
        forced = (key > last) | ((equal == 1) & (seen + tl.cumsum(equal, 0) <= ties))
        bits = key.to(keys_ptr.dtype.element_ty, bitcast=True)
        tl.store(keys_ptr + first + offsets, tl.where(forced, -1, bits), mask=inside)
        seen += tl.sum(equal)


@kernel()
def _select_channels_limit_kernel(
    keys_ptr, limit_ptr, total, budget, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    last, ties = nth_greatest(keys_ptr, 1, total, budget, BITS, False, BLOCK)
    seen, place = 0, -1
    for at in range(0, total, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < total
        key = _load_keys(keys_ptr, offsets, 1, inside, BITS, False)
        equal = ((key == last) & inside).to(tl.int32)
        within = (equal == 1) & (seen + tl.cumsum(equal, 0) <= ties)
        place = tl.maximum(place, tl.max(tl.where(within, offsets, -1), 0))
        seen += tl.sum(equal)
    tl.store(limit_ptr, last.to(tl.int64))
    tl.store(limit_ptr + 1, place)


@kernel()
def _select_channels_list_kernel(
    keys_ptr, limit_ptr, bounds_ptr, indices_ptr, inverse_ptr, counts_ptr,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    first = tl.load(bounds_ptr + group).to(tl.int32)
    size = tl.load(bounds_ptr + group + 1).to(tl.int32) - first
    last = tl.load(limit_ptr).to(tl.uint64 if BITS == 64 else tl.uint32)
    place = tl.load(limit_ptr + 1).to(tl.int32)
    count = 0
    for at in range(0, size, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < size
        key = _load_keys(keys_ptr + first, offsets, 1, inside, BITS, False)
        chosen = inside & ((key > last) | ((key == last) & (first + offsets <= place)))
        nth = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        inverse = tl.where(chosen, nth, -1)
        tl.store(inverse_ptr + first + offsets, inverse.to(tl.int64), mask=inside)
        tl.store(indices_ptr + first + nth, offsets.to(tl.int64), mask=chosen)
        count += tl.sum(chosen.to(tl.int32))
    for at in range(0, size, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        none = tl.full((BLOCK,), -1, tl.int64)
        tl.store(indices_ptr + first + offsets, none, mask=(offsets >= count) & (offsets < size))
    tl.store(counts_ptr + group, count)


def select_channels(
    scores: Tensor, sizes: Sequence[int], budget: int, min_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``budget`` best channels of all groups; see the reference.

    Scores are compared, never computed with, so that float64 runs here too.

    Shape:
        scores: (total,) floating -> (total,), (total,), (groups,) int64.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    scores = scores.detach().contiguous()
    bounds = group_places(tuple(sizes), scores.device).bounds
    total, groups = scores.shape[0], len(sizes)
    bits = 8 * scores.element_size()
    keys = torch.empty_like(scores, dtype=torch.int64 if bits == 64 else torch.int32)
    limit = torch.empty(2, dtype=torch.int64, device=scores.device)
    indices = torch.empty_like(scores, dtype=torch.int64)
    inverse = torch.empty_like(indices)
    counts = torch.empty(groups, dtype=torch.int64, device=scores.device)
    group = {"BITS": bits, "BLOCK": _GROUP_BLOCK, "num_warps": _GROUP_WARPS}
    every = {"BITS": bits, "BLOCK": _TOTAL_BLOCK, "num_warps": _TOTAL_WARPS}
    with on(scores):
        _select_channels_force_kernel[(groups,)](scores, bounds, keys, min_active, **group)
        _select_channels_limit_kernel[(1,)](keys, limit, total, budget, **every)
        _select_channels_list_kernel[(groups,)](
            keys, limit, bounds, indices, inverse, counts, **group
        )
    return indices, inverse, counts

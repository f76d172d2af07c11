"""Sums and moments over batch and pixels, in two deterministic levels.

The first level leaves partial results of tiles of rows, a row being one (n, pixel); the second
combines them. Moments are (mean, M2), M2 the sum of squared differences from the mean, so that a
mean of 1e4 with a deviation of 1 loses nothing.

Legend: N batch, k channels, T tiles of rows, S sets of tiles (samples), Q sums, F rows folded
into one.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.triton._launch import cdiv, kernel, on
from dcx_kernels.kernels.triton._math import add, cast
from dcx_kernels.kernels.triton._walk import element_offsets, plan, walk

__all__ = ["finish_moments", "finish_statistics", "moments", "sum_partials"]

# --- first level ----------------------------------------------------------------------------------


@kernel("x_ptr")
def _moments_kernel(
    x_ptr, partial_ptr, span, block, cols, channels, pixels, stride,
    PLANAR: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        stride = (stride // 8) * 8
        if PLANAR:
            pixels, span, block = (pixels // 8) * 8, (span // 8) * 8, (block // 8) * 8
        else:
            cols = (cols // 8) * 8
    blocks = tl.cdiv(cols, BLOCK_C)
    tile = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tile * block + tl.arange(0, BLOCK_R)
    end = tl.minimum(tile * block + block, span)
    AXIS: tl.constexpr = 1 if PLANAR else 0
    if PLANAR:
        r, c = row[None, :], col[:, None]
        if ALIGNED:
            end = (end // 8) * 8
    else:
        r, c = row[:, None], col[None, :]
    # sums of differences from the mean of the first rows: one pass, and nothing cancels
    inside = (r < end) & (c < cols)
    x = tl.load(x_ptr + element_offsets(r, c, stride, pixels, PLANAR), inside, other=0.0)
    x = x.to(tl.float32)
    near = add(x, AXIS, True) / tl.minimum(end - tile * block, BLOCK_R)
    total = tl.where(inside, x - near, 0.0)
    square = total * total
    for i in range(BLOCK_R, end - tile * block, BLOCK_R):
        inside = (r + i < end) & (c < cols)
        x = tl.load(x_ptr + element_offsets(r + i, c, stride, pixels, PLANAR), inside, other=0.0)
        x = tl.where(inside, x.to(tl.float32) - near, 0.0)
        total += x
        square += x * x
    count = (end - tile * block).to(tl.float32)
    total = add(total, AXIS, True)
    mean = near + total / count
    m2 = tl.maximum(add(square, AXIS, True) - total * (total / count), 0.0)
    at = partial_ptr + ((tile * (cols // channels) + c // channels) * 2) * channels + c % channels
    tl.store(at, mean, c < cols)
    tl.store(at + channels, m2, c < cols)


def moments(x: Tensor) -> tuple[Tensor, int, int]:
    """Begin mean and variance of x (N, k, ...), fp16, bf16 or fp32, not empty.

    Returns:
        partial (T, 2, k), mean and M2 of every tile, float32; the number of rows; and of rows in a
        tile, the last of which may be shorter.
    """
    (x,), strides, planar, batch, channels, pixels = walk(x)
    rows = batch * pixels
    cut = plan(1, rows, channels, pixels, strides, planar, True)
    partial = x.new_empty((cut.tiles * cut.times, 2, channels), dtype=torch.float32)
    grid = (cut.tiles * cdiv(cut.cols, cut.block_cols),)
    with on(x):
        _moments_kernel[grid](
            x, partial, cut.span, cut.block, cut.cols, channels, pixels, strides[0] * cut.times,
            PLANAR=planar, ALIGNED=cut.aligned,
            BLOCK_R=cut.block_rows, BLOCK_C=cut.block_cols,
        )  # fmt: skip
    return partial, rows, cut.block


# --- second level ---------------------------------------------------------------------------------


@kernel()
def _finish_kernel(
    partial_ptr, mean_ptr, second_ptr, running_mean_ptr, running_var_ptr, active_ptr,
    tiles, rows, block, channels, momentum, eps,
    INVSTD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    exists = c < channels
    # BLOCK_T sequences of tiles side by side, then across them
    count = tl.zeros((BLOCK_T, 1), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = (first + t)[:, None]
        inside = (tile < tiles) & exists[None, :]
        at = partial_ptr + tile * 2 * channels + c[None, :]
        mean_t = tl.load(at, inside, other=0.0)
        m2_t = tl.load(at + channels, inside, other=0.0)
        # of a short tile, the last one, and of none
        count_t = tl.maximum(tl.minimum(block, rows - tile * block), 0)
        count_t = tl.where(tile < tiles, count_t, 0).to(tl.float32)
        both = count + count_t
        share = count_t / tl.maximum(both, 1.0)
        delta = mean_t - mean
        mean += delta * share
        m2 += m2_t + delta * delta * (count * share)
        count = both
    here = add(tl.where(t[:, None] == 0, mean, 0.0), 0)
    total = rows.to(tl.float32)
    away = add(count * (mean - here[None, :]), 0) / total
    delta = mean - (here + away)[None, :]
    m2_all = add(m2 + count * delta * delta, 0)
    mean_all = here + away
    tl.store(mean_ptr + c, mean_all, exists)
    if INVSTD:
        tl.store(second_ptr + c, 1.0 / tl.sqrt_rn(m2_all / total + eps), exists)
        place = c
        if active_ptr is not None:
            place = tl.load(active_ptr + c, exists, other=0)
        if running_mean_ptr is not None:
            old = tl.load(running_mean_ptr + place, exists, other=0.0).to(tl.float32)
            new = old + momentum * (mean_all - old)
            tl.store(running_mean_ptr + place, cast(new, running_mean_ptr.dtype.element_ty), exists)
        if running_var_ptr is not None:
            unbiased = m2_all / tl.maximum(rows - 1, 1).to(tl.float32)
            unbiased = tl.where(rows > 1, unbiased, float("nan"))  # 0 / 0, as in torch
            old = tl.load(running_var_ptr + place, exists, other=0.0).to(tl.float32)
            new = old * (1.0 - momentum) + momentum * unbiased
            tl.store(running_var_ptr + place, cast(new, running_var_ptr.dtype.element_ty), exists)
    else:
        tl.store(second_ptr + c, m2_all, exists)


def _finish(
    partial: Tensor,
    rows: int,
    block: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor | None,
    momentum: float,
    eps: float,
    invstd: bool,
) -> tuple[Tensor, Tensor]:
    tiles, _, channels = partial.shape
    assert tiles == cdiv(rows, block)
    mean, second = partial.new_empty(channels), partial.new_empty(channels)
    if channels:
        with on(partial):
            _finish_kernel[(cdiv(channels, 16),)](
                partial, mean, second, running_mean, running_var, active,
                tiles, rows, block, channels, momentum, eps,
                INVSTD=invstd, BLOCK_T=128, BLOCK_C=16,
            )  # fmt: skip
    return mean, second


def finish_moments(partial: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Combine the moments of tiles (Chan et al., 1979).

    Args:
        partial: contiguous (T, 2, k) float32: mean and M2 of rows [t * block, (t + 1) * block), or
            as many as there are.
        rows: of all tiles together.

    Returns:
        mean and M2 of all rows, (k,) float32 each.
    """
    return _finish(partial, rows, block, None, None, None, 0.0, 0.0, False)


def finish_statistics(
    partial: Tensor,
    rows: int,
    block: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Combine the moments of tiles to the statistics of a batch norm, and update the running ones.

    Args:
        partial, rows, block: see `finish_moments`.
        running_mean, running_var: contiguous, full (K,); written in place at ``active``.
        active: index list (k,), or None when all channels are active.

    Returns:
        mean and inverse standard deviation, (k,) float32 each.
    """
    return _finish(partial, rows, block, running_mean, running_var, active, momentum, eps, True)


@kernel()
def _sum_partials_kernel(
    partial_ptr, sum_ptr, tiles, cols, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    blocks = tl.cdiv(cols, BLOCK_C)
    here = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)[:, None]
    at = partial_ptr + here * tiles * cols + c[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + t
        total += tl.load(at + tile * cols, (tile < tiles) & (c[None, :] < cols), other=0.0)
    tl.store(sum_ptr + here * cols + c, add(total, 0), c < cols)


def sum_partials(partial: Tensor) -> Tensor:
    """Add contiguous partial sums (S, T, Q, k) float32 over T, in a fixed order: (S, Q, k)."""
    sets, tiles, sums, channels = partial.shape
    if tiles == 1:
        return partial.view(sets, sums, channels)
    total = partial.new_empty((sets, sums, channels))
    if total.numel():
        cols = sums * channels
        block_t = 8 if tiles <= 8 else 64
        with on(partial):
            _sum_partials_kernel[(sets * cdiv(cols, 32),)](
                partial, total, tiles, cols, BLOCK_T=block_t, BLOCK_C=32
            )
    return total

"""How a kernel walks over tensors (N, k, ...): as rows of channels, or as planes of pixels.

Legend: N batch, k channels; a row is one (n, pixel).
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.triton._launch import aligned, cdiv

__all__ = ["Plan", "Walk", "element_offsets", "fold", "plan", "stride_in", "walk"]

_PROGRAMS = 1024  # about what a large GPU holds at once
_ROWS_TILE = (64, 64)  # rows, channels: channels are contiguous
_PLANAR_TILE = (512, 8)  # pixels are contiguous
_COLUMNS = 64


class Walk(NamedTuple):
    """Tensors of one shape, ready for a kernel.

    Attributes:
        tensors: 16-byte aligned, in one form.
        strides: between rows (n, pixel) of k contiguous channels, or, ``planar``, between samples
            of k contiguous planes.
        planar: which of these.
        batch, channels, pixels: the extents.
    """

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    planar: bool
    batch: int
    channels: int
    pixels: int


def walk(first: Tensor, *others: Tensor) -> Walk:
    """Bring tensors into the form of the first; copies only what is in another."""
    first = aligned(first)
    planar = stride_in(first, False) is None
    if planar and stride_in(first, True) is None:
        last = first.dim() == 4 and first.stride(1) == 1
        form = torch.channels_last if last else torch.contiguous_format
        first = first.contiguous(memory_format=form)
        planar = stride_in(first, False) is None
    tensors, strides = [], []
    for x in (first, *others):
        x = aligned(x)
        stride = stride_in(x, planar)
        if stride is None:
            x = torch.empty_like(first, dtype=x.dtype).copy_(x)
            stride = stride_in(x, planar)
            assert stride is not None
        tensors.append(x)
        strides.append(stride)
    batch, channels = first.shape[:2]
    return Walk(tuple(tensors), tuple(strides), planar, batch, channels, first.shape[2:].numel())


def stride_in(x: Tensor, planar: bool) -> int | None:
    """Return the stride of samples (``planar``) or rows as in `Walk`, None if x is not so."""
    if planar:
        if _joint_stride(x, range(1, x.dim()), 1) != 1:
            return None
        return x.stride(0) if x.shape[0] != 1 else x.shape[1:].numel()
    if x.shape[1] != 1 and x.stride(1) != 1:
        return None
    return _joint_stride(x, (0, *range(2, x.dim())), x.shape[1])


def _joint_stride(x: Tensor, dims: tuple[int, ...] | range, default: int) -> int | None:
    """Return the stride of the innermost of ``dims`` if the others continue it."""
    first, following = None, 0
    for dim in reversed(dims):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 1:
            continue
        if first is None:
            first = stride
        elif stride != following:
            return None
        following = stride * size
    return default if first is None else first


def fold(rows: int, cols: int, strides: tuple[int, ...]) -> int:
    """Return how many rows to take as one, so that they are whole numbers of 64 columns.

    Rows of an odd number of channels begin at odd addresses; 8 together do not, and are loaded 16
    bytes at a time. Few channels fill tiles that way, too.
    """
    if any(stride != cols for stride in strides):
        return 1
    times = _COLUMNS // gcd(cols, _COLUMNS)
    while rows % times:
        times //= 2
    return times


class Plan(NamedTuple):
    """How a reduction is cut: ``tiles`` a set, ``block`` rows each, of ``span``; see `fold`."""

    times: int
    span: int
    block: int
    tiles: int
    cols: int
    aligned: bool
    block_rows: int
    block_cols: int


@lru_cache(maxsize=4096)
def plan(
    sets: int, span: int, channels: int, pixels: int, strides: tuple[int, ...], planar: bool,
    equal: bool,
) -> Plan:  # fmt: skip
    """Cut ``sets`` of ``span`` rows each into tiles; ``equal`` ones of ``block`` rows if folded."""
    block_rows, block_cols = _PLANAR_TILE if planar else _ROWS_TILE
    folded = 1 if planar else fold(span, channels, strides)
    for times in sorted({folded, 1}, reverse=True):
        rows, cols = span // times, channels * times
        wanted = max(1, min(_PROGRAMS // (sets * cdiv(cols, block_cols)), cdiv(rows, block_rows)))
        block = cdiv(cdiv(rows, wanted), block_rows) * block_rows
        if equal and times > 1:
            fitting = (rows // t for t in range(wanted, wanted // 2, -1) if rows % t == 0)
            block = next(fitting, 0)
        if block:
            break
    vectors = all(s * times % 8 == 0 for s in (*strides, pixels if planar else channels))
    return Plan(times, rows, block, cdiv(rows, block), cols, vectors, block_rows, block_cols)


@triton.jit
def element_offsets(rows, cols, stride, pixels, PLANAR: tl.constexpr):
    """Return where (row, column) lies in a tensor; rows and cols broadcast against each other."""
    if PLANAR:
        return (rows // pixels).to(tl.int64) * stride + (cols * pixels + rows % pixels)
    return rows.to(tl.int64) * stride + cols

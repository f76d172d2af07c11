"""Slices of many tensors, moved in one launch.

What differs from layer to layer stands in a table in device memory, see `kernels.slice_table`. The
host writes it and sends it in one copy. Blocks are numbered through all slices; a program finds its
slice by binary search over the first block of each. (A list of the slice of each block would save
the search, but grows with the weights: the table has some kB.) Where an entry of a slice lies in
the full tensor is computed from the index lists, so no list of rows is made.

Tensors of one launch have one dtype, as the type of a pointer is fixed when a kernel is compiled.
Moves copy bits: one launch for each size of an element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.slice_moves import SliceMoves
from dcx_kernels.kernels.slice_table import COMMON, TableReader
from dcx_kernels.kernels.triton._launch import kernel, on, serves

__all__ = [
    "BLOCK",
    "READER",
    "elements",
    "find_slice",
    "gather_slices",
    "offsets",
    "scatter_slices_",
]

BLOCK = 1024
_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

_COMMON = tl.constexpr(COMMON)

# elements of a slice are numbered in int32
READER = TableReader(serves=lambda tensor: serves(tensor.device), block=BLOCK, most=2**31 - BLOCK)


@triton.jit
def find_slice(table_ptr, count, COLUMNS: tl.constexpr):
    """Return the line of the slice that this program works on, among ``count`` lines."""
    block = tl.program_id(0)
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle * COLUMNS) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table_ptr + low * COLUMNS


@triton.jit
def elements(line_ptr, BLOCK: tl.constexpr):
    """Return this program's elements of the packed slice, int32, and which of them exist."""
    first = tl.load(line_ptr).to(tl.int32)
    element = (tl.program_id(0) - first) * BLOCK + tl.arange(0, BLOCK)
    return element, element < tl.load(line_ptr + 1).to(tl.int32)


@triton.jit
def offsets(line_ptr, element, inside):
    """Return the places in the full tensor of elements of the packed slice, int64."""
    out_list = tl.load(line_ptr + 2)
    in_list = tl.load(line_ptr + 3)
    place = element.to(tl.int64)
    if (out_list != 0) | (in_list != 0):
        row = tl.load(line_ptr + 4).to(tl.int32)
        inner = tl.load(line_ptr + 5).to(tl.int32)
        k = element // row  # of the active ones, as c
        c = (element - k * row) // inner
        pixel = element - k * row - c * inner
        channel = k.to(tl.int64)
        if out_list != 0:
            out_ptr = out_list.to(tl.pointer_type(tl.int64))
            channel = tl.load(out_ptr + k, mask=inside, other=0)
        source = c
        if in_list != 0:
            in_ptr = in_list.to(tl.pointer_type(tl.int64))
            group = k // tl.load(line_ptr + 6).to(tl.int32)
            ahead = group * tl.load(line_ptr + 7).to(tl.int32)
            number = tl.load(in_ptr + ahead + c, mask=inside, other=0).to(tl.int32)
            source = number % tl.load(line_ptr + 8).to(tl.int32)
        place = channel * tl.load(line_ptr + 9) + source * inner + pixel
    return place


@kernel()
def _move_slices_kernel(
    table_ptr,
    count,
    SCATTER: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line_ptr = find_slice(table_ptr, count, COLUMNS)
    element, inside = elements(line_ptr, BLOCK)
    full_ptr = tl.load(line_ptr + _COMMON).to(tl.pointer_type(DTYPE))
    full_ptr += offsets(line_ptr, element, inside)
    packed_ptr = tl.load(line_ptr + _COMMON + 1).to(tl.pointer_type(DTYPE)) + element
    if SCATTER:
        tl.store(full_ptr, tl.load(packed_ptr, mask=inside), mask=inside)
    else:
        tl.store(packed_ptr, tl.load(full_ptr, mask=inside), mask=inside)


def _move(lines: Tensor, blocks: int, size: int, scatter: bool) -> None:
    count, columns = lines.shape
    with on(lines):
        _move_slices_kernel[(blocks,)](
            lines, count, SCATTER=scatter, DTYPE=_BITS[size], COLUMNS=columns, BLOCK=BLOCK
        )


_MOVES = SliceMoves(READER, _move)

gather_slices = _MOVES.gather_slices
scatter_slices_ = _MOVES.scatter_slices_

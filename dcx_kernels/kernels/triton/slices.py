"""Slices of many tensors, moved in one launch.

What differs from layer to layer stands in a table in device memory: addresses and extents, a line
of int64 numbers a slice. The host writes it and sends it in one copy. Blocks are numbered through
all slices; a program finds its slice by binary search over the first block of each. (A list of the
slice of each block would save the search, but grows with the weights: the table has some kB.) Where
an entry of a slice lies in the full tensor is computed from the index lists, so no list of rows is
made.

Tensors of one launch have one dtype, as the type of a pointer is fixed when a kernel is compiled.
Moves copy bits: one launch for each size of an element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from dcx_kernels.kernels.triton._launch import cdiv, kernel, on, serves

__all__ = [
    "BLOCK",
    "COMMON",
    "MOST",
    "Table",
    "elements",
    "find_slice",
    "gather_slices",
    "offsets",
    "scatter_slices_",
]

BLOCK = 1024
COMMON = 10  # columns that every table has, see `Table.add`
_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
MOST = 2**31 - BLOCK  # elements of a slice are numbered in int32

_COMMON = tl.constexpr(COMMON)


class Table:
    """The lines of one launch.

    Args:
        own: columns that the kernel has beside the common ones.
    """

    def __init__(self, own: int) -> None:
        self.columns = COMMON + own
        self.blocks = 0
        self._numbers: list[int] = []

    def add(self, slice_: Slice | None, full: Tensor, *own: int) -> None:
        """Add the line of a slice of ``full``, which must lie flat if the slice is None."""
        where = [0] * (COMMON - 2)
        numel = full.numel()
        if slice_ is not None:
            numel = slice_.numel
            where = _where(slice_) if numel else where
        if numel == 0:
            return
        self._numbers += [self.blocks, numel, *where, *own]
        self.blocks += cdiv(numel, BLOCK)

    def __len__(self) -> int:
        return len(self._numbers) // self.columns

    def to(self, device: torch.device) -> Tensor:
        """Return the table in the memory of ``device``."""
        pinned = device.type == "cuda"  # the copy waits for nobody then
        table = torch.tensor(self._numbers, dtype=torch.int64, pin_memory=pinned)
        return table.to(device, non_blocking=True)


def _where(slice_: Slice) -> list[int]:
    """Return what `offsets` reads: two lists and how to count through them."""
    num_out, num_in = slice_.packed_shape[0], slice_.packed_shape[1:2]
    per_channel = slice_.per_channel
    inner = 1
    for extent in per_channel[2:]:
        inner *= extent
    per_group = per_channel[1] if len(per_channel) > 1 else 1
    inputs = num_in[0] // slice_.inner if num_in else 1
    # of one channel per group, that one is active
    in_idx = slice_.in_idx if per_group > 1 else None
    return [
        0 if slice_.out_idx is None else slice_.out_idx.data_ptr(),
        0 if in_idx is None else in_idx.data_ptr(),
        inputs * inner,
        inner,
        num_out // slice_.active_groups,
        inputs,
        per_group,
        per_group * inner,
    ]


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


def gather_slices(
    dense: Sequence[Tensor],
    slices: Sequence[Slice | None],
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Copy the active slices of many tensors: see `reference.slices.gather_slices`."""
    made = list(out or [None] * len(dense))
    packed: list[Tensor] = []
    for tensor, slice_, memory in zip(dense, slices, made, strict=True):
        shape = tensor.shape if slice_ is None else slice_.packed_shape
        if not _moves(tensor, slice_):
            packed += reference.gather_slices([tensor], [slice_], [memory])
        elif memory is None:
            packed.append(tensor.new_empty(shape))
        else:
            numel = tensor.numel() if slice_ is None else slice_.numel
            packed.append(memory[:numel].view(shape))
    _move(dense, packed, slices, scatter=False)
    return packed


def scatter_slices_(
    dense: Sequence[Tensor], packed: Sequence[Tensor], slices: Sequence[Slice | None]
) -> None:
    """Write packed slices back: see `reference.slices.scatter_slices_`."""
    packed = [part.contiguous() for part in packed]
    for tensor, part, slice_ in zip(dense, packed, slices, strict=True):
        if not _moves(tensor, slice_):
            reference.scatter_slices_([tensor], [part], [slice_])
    _move(dense, packed, slices, scatter=True)
    torch.autograd.graph.increment_version(list(dense))


def _moves(tensor: Tensor, slice_: Slice | None) -> bool:
    """Whether the kernel moves the slice of ``tensor``, rather than the reference."""
    numel = tensor.numel() if slice_ is None else slice_.numel
    known = tensor.element_size() in _BITS and numel < MOST
    return serves(tensor.device) and known and tensor.is_contiguous()


def _move(
    dense: Sequence[Tensor],
    packed: Sequence[Tensor],
    slices: Sequence[Slice | None],
    scatter: bool,
) -> None:
    tables: dict[tuple[torch.device, int], tuple[Table, Tensor]] = {}
    for tensor, part, slice_ in zip(dense, packed, slices, strict=True):
        if _moves(tensor, slice_):
            key = (tensor.device, tensor.element_size())
            if key not in tables:
                tables[key] = Table(own=2), tensor
            tables[key][0].add(slice_, tensor, tensor.data_ptr(), part.data_ptr())
    for (device, size), (table, tensor) in tables.items():
        if table.blocks:
            with on(tensor):
                _move_slices_kernel[(table.blocks,)](
                    table.to(device), len(table), SCATTER=scatter, DTYPE=_BITS[size],
                    COLUMNS=table.columns, BLOCK=BLOCK,
                )  # fmt: skip

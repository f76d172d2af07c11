"""Slices of many tensors as a table of numbers, which a kernel reads: one line a slice.

What differs from layer to layer are addresses and extents. A line holds, all int64:

====  ==============================================================================================
0     number of the slice's first block among the blocks of all slices
1     elements in the slice
2, 3  addresses of the lists of active output and input channels; 0: all, in order
4     elements of a packed filter
5     elements of an input channel in a filter
6, 7  active output and input channels per active group
8     input channels per group
9     elements of a full filter
10..  the kernel's own columns
====  ==============================================================================================

Where both lists are 0 the slice is everything, and columns from 4 on say nothing. A kernel trusts
the table: whoever adds a line has looked at the tensors, and keeps them alive through the call.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcx_kernels.kernels.slices import Slice

__all__ = ["COMMON", "SliceTable", "TableReader"]

COMMON = 10  # columns that every table has


class SliceTable:
    """The lines of one call.

    Args:
        own: columns that the kernel has beside the common ones.
        block: elements of a block.

    Attributes:
        columns: numbers in a line.
        blocks: blocks of all slices together.
        numbers: the lines, one after another.
    """

    __slots__ = ("_block", "blocks", "columns", "numbers")

    def __init__(self, own: int, block: int = 1) -> None:
        self.columns = COMMON + own
        self.blocks = 0
        self.numbers: list[int] = []
        self._block = block

    def add(self, slice_: Slice | None, full: Tensor, *own: int) -> None:
        """Add the line of a slice of ``full``, which must lie flat if the slice is None.

        A slice without an entry has no line.
        """
        numel = full.numel() if slice_ is None else slice_.numel
        if numel == 0:
            return
        where = _EVERYTHING if slice_ is None else _where(slice_)
        self.numbers += (self.blocks, numel, *where, *own)
        self.blocks += -(-numel // self._block)

    def __len__(self) -> int:
        return len(self.numbers) // self.columns

    def on(self, device: torch.device) -> Tensor:
        """Return the lines, (lines, columns) int64, in the memory of ``device``."""
        # torch.tensor takes several times as long
        lines = torch.frombuffer(array("q", self.numbers), dtype=torch.int64)
        lines = lines.view(-1, self.columns)
        if device.type == "cuda":  # the copy waits for nobody then
            lines = lines.pin_memory().to(device, non_blocking=True)
        return lines


@dataclass(frozen=True)
class TableReader:
    """What a backend says of its kernels that read tables.

    Args:
        serves: whether they run where a tensor is.
        block: elements that one of their blocks works on.
        most: they number elements of a tensor below this.
    """

    serves: Callable[[Tensor], bool]
    block: int = 1
    most: int = 1 << 63

    def fits(self, full: Tensor, slice_: Slice | None) -> bool:
        """Whether ``slice_`` is one of ``full``, by lists that kernels can read where it is."""
        if not self.serves(full) or full.layout is not torch.strided or full.numel() >= self.most:
            return False
        if slice_ is None:
            return True
        device = full.device
        for listed in (slice_.out_idx, slice_.in_idx):
            if listed is not None and (listed.device != device or listed.dtype is not torch.int64):
                return False
        return full.shape == slice_.shape

    def table(self, own: int) -> SliceTable:
        """Return a table without a line, for a kernel with ``own`` columns."""
        return SliceTable(own, self.block)


_EVERYTHING = (0,) * (COMMON - 2)


def _where(slice_: Slice) -> tuple[int, ...]:
    """Return where the entries are: two lists and how to count through them."""
    num_out, num_in = slice_.packed_shape[0], slice_.packed_shape[1:2]
    per_channel = slice_.per_channel
    inner = math.prod(per_channel[2:])
    per_group = per_channel[1] if len(per_channel) > 1 else 1
    inputs = num_in[0] // slice_.inner if num_in else 1
    # of one channel per group, that one is active
    in_idx = slice_.in_idx if per_group > 1 else None
    return (
        0 if slice_.out_idx is None else slice_.out_idx.data_ptr(),
        0 if in_idx is None else in_idx.data_ptr(),
        inputs * inner,
        inner,
        num_out // slice_.active_groups,
        inputs,
        per_group,
        per_group * inner,
    )

"""Slices of many tensors, moved in one call.

The library reads a table of addresses and extents (`kernels.slice_table`), which is what a list of
hundreds of tensors costs least in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.slice_moves import SliceMoves
from dcx_kernels.kernels.slice_table import TableReader

__all__ = ["READER", "gather_slices", "scatter_slices_"]

READER = TableReader(serves=lambda tensor: tensor.is_cpu)


def _move(lines: Tensor, blocks: int, size: int, scatter: bool) -> None:
    torch.ops.dcx_native.move_slices(lines, size, scatter)


_MOVES = SliceMoves(READER, _move, makes_vectors=False)

gather_slices = _MOVES.gather_slices
scatter_slices_ = _MOVES.scatter_slices_

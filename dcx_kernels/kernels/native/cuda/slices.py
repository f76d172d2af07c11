"""Slices of many tensors, moved in one launch.

The table of `kernels.slice_table` goes to the device in one copy, which waits for nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.slice_moves import SliceMoves
from dcx_kernels.kernels.slice_table import TableReader

__all__ = ["MOVES", "READER", "gather_slices", "scatter_slices_"]

_BLOCK = 1024  # csrc/launch/slices.h

# kernels number elements in int32
READER = TableReader(serves=lambda tensor: tensor.is_cuda, block=_BLOCK, most=2**31 - _BLOCK)


def _move(lines: Tensor, blocks: int, size: int, scatter: bool) -> None:
    torch.ops.dcx_native.move_slice_blocks(lines, blocks, size, scatter)


MOVES = SliceMoves(READER, _move)

gather_slices = MOVES.gather_slices
scatter_slices_ = MOVES.scatter_slices_

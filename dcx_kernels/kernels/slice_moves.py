"""Slices of many tensors, moved in one launch: what backends that read tables have in common.

Moves copy bits: one launch for each device and size of an element. What the kernels do not know
goes to the reference, all of it in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slice_table import SliceTable, TableReader
from dcx_kernels.kernels.slices import Slice

__all__ = ["SliceMoves"]

_SIZES = (1, 2, 4, 8)

Tables = dict[tuple[torch.device, int], SliceTable]


@dataclass(frozen=True)
class SliceMoves:
    """The moves of a backend.

    Args:
        reader: what its kernels read.
        move: launches one: (lines, blocks, bytes of an element, whether to scatter). Columns of its
            own are the addresses of the full tensor and of the packed one.
        makes_vectors: whether it gathers vectors for which there is no memory; the reference makes
            all of them together, where each costs this one an allocation from Python.
    """

    reader: TableReader
    move: Callable[[Tensor, int, int, bool], None]
    makes_vectors: bool = True

    def gather_slices(
        self,
        dense: Sequence[Tensor],
        slices: Sequence[Slice | None],
        out: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Copy the active slices of many tensors: see `reference.slices.gather_slices`."""
        made = out or [None] * len(dense)
        tables: Tables = {}
        rest: list[int] = []
        packed = list(dense)
        for index, (tensor, slice_, memory) in enumerate(zip(dense, slices, made, strict=True)):
            if not (self._makes(tensor, memory) and self._knows(tensor, slice_)):
                rest.append(index)
                continue
            shape = tensor.shape if slice_ is None else slice_.packed_shape
            if memory is None:
                part = tensor.new_empty(shape)
            else:  # view refuses memory that is too short
                part = memory[: tensor.numel() if slice_ is None else slice_.numel].view(shape)
            packed[index] = part
            self._add(tables, tensor, part, slice_)
        if rest:
            others = [_pick(values, rest) for values in (dense, slices, made)]
            for index, part in zip(rest, reference.gather_slices(*others), strict=True):
                packed[index] = part
        self._move(tables, scatter=False)
        return packed

    def scatter_slices_(
        self, dense: Sequence[Tensor], packed: Sequence[Tensor], slices: Sequence[Slice | None]
    ) -> None:
        """Write packed slices back: see `reference.slices.scatter_slices_`."""
        tables: Tables = {}
        rest: list[int] = []
        written: list[Tensor] = []
        packed = [part.contiguous() for part in packed]  # alive until they are moved
        for index, (tensor, part, slice_) in enumerate(zip(dense, packed, slices, strict=True)):
            numel = tensor.numel() if slice_ is None else slice_.numel
            if part.numel() == numel and _alike(part, tensor) and self._knows(tensor, slice_):
                self._add(tables, tensor, part, slice_)
                written.append(tensor)
            else:
                rest.append(index)
        if rest:
            reference.scatter_slices_(*(_pick(values, rest) for values in (dense, packed, slices)))
        self._move(tables, scatter=True)
        # autograd, and whoever keeps copies, must hear what was written through addresses
        torch.autograd.graph.increment_version(written)

    def _makes(self, tensor: Tensor, memory: Tensor | None) -> bool:
        """Whether the result can be in that memory, or in memory of its own."""
        if memory is None:
            return self.makes_vectors or tensor.dim() != 1
        return _alike(memory, tensor) and memory.is_contiguous()

    def _knows(self, tensor: Tensor, slice_: Slice | None) -> bool:
        """Whether the kernels move the slice of ``tensor``, rather than the reference."""
        fits = tensor.element_size() in _SIZES and self.reader.fits(tensor, slice_)
        return fits and tensor.is_contiguous()

    def _add(self, tables: Tables, tensor: Tensor, part: Tensor, slice_: Slice | None) -> None:
        key = tensor.device, tensor.element_size()
        table = tables.get(key)
        if table is None:
            table = tables[key] = self.reader.table(own=2)
        table.add(slice_, tensor, tensor.data_ptr(), part.data_ptr())

    def _move(self, tables: Tables, scatter: bool) -> None:
        for (device, size), table in tables.items():
            if table.blocks:
                self.move(table.on(device), table.blocks, size, scatter)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and one.device == other.device


def _pick(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [values[index] for index in indices]

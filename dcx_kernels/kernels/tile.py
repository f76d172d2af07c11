"""A tile: what one program of a kernel computes, and what that takes of a processor.

Legend: rows are pixels (N P Q), out the out channels (k), inner the in channels (c). A convolution
accumulates rows x out over inner, a gradient of a weight out x inner over rows.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

__all__ = ["SHARED_LIMIT", "Kind", "Tile", "fitted"]

SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory that one block may use on every supported chip (sm_89, sm_120)."""

Kind = Literal["conv", "wgrad"]


class Tile(NamedTuple):
    """What one program computes, and how.

    Attributes:
        rows, out, inner: pixels, out channels, in channels; powers of two.
        warps, stages: of a program; of its software pipeline.
    """

    rows: int
    out: int
    inner: int
    warps: int
    stages: int

    def shared_bytes(self, kind: Kind, itemsize: int, pairs: bool = False) -> int:
        """Return the shared memory of the operands of all stages.

        Args:
            kind: which operands the tile is of.
            itemsize: bytes of an element.
            pairs: the gradient comes with a second operand of its size (see `NormGrad`).
        """
        first = 2 if pairs else 1
        if kind == "conv":
            return self.stages * itemsize * self.inner * (self.rows * first + self.out)
        return self.stages * itemsize * self.rows * (self.out * first + self.inner)

    def loaded(self, kind: Kind) -> int:
        """Return the elements of both operands of a stage."""
        if kind == "conv":
            return self.inner * (self.rows + self.out)
        return self.rows * (self.out + self.inner)

    def accumulated(self, kind: Kind) -> int:
        """Return the elements of the result."""
        return self.out * (self.rows if kind == "conv" else self.inner)


# elements a thread may hold; with more, registers spill (seen in machine code for sm_80 and sm_90)
_LOADED, _LOADED_AND_FUSED, _COMPUTED, _ACCUMULATED = 24, 16, 32, 32


@functools.cache  # asked several times a launch
def fitted(
    kind: Kind,
    tile: Tile,
    itemsize: int,
    *,
    scalar: bool = False,
    pairs: bool = False,
    epilogue: bool = False,
) -> Tile:
    """Make a tile fit what a launch does besides multiplying: more warps, or a smaller tile.

    Args:
        kind, tile: what is launched.
        itemsize: bytes of an element.
        scalar: operands are loaded element by element, which goes through registers.
        pairs: the gradient is computed from two operands while it is loaded.
        epilogue: the result is reduced, too, or masked.
    """
    loaded = _LOADED_AND_FUSED if pairs or epilogue else _LOADED
    staged = scalar and itemsize < 4  # four bytes go past the registers
    if pairs and kind == "wgrad" and not staged:  # both operands are computed
        staged, loaded = True, _COMPUTED
    # operands on their way leave less room for accumulators
    bounded = pairs or (staged and kind == "conv")
    if pairs:
        tile = tile._replace(stages=min(tile.stages, 3))
    while True:
        threads = 32 * tile.warps
        if bounded and tile.accumulated(kind) > _ACCUMULATED * threads:
            tile = tile._replace(warps=8) if tile.warps < 8 else tile._replace(out=tile.out // 2)
        elif staged and tile.loaded(kind) > loaded * threads:
            shorter = {"inner": tile.inner // 2} if kind == "conv" else {"rows": tile.rows // 2}
            tile = tile._replace(warps=8) if tile.warps < 8 else tile._replace(**shorter)
        elif tile.shared_bytes(kind, itemsize, pairs) > SHARED_LIMIT:
            tile = tile._replace(stages=tile.stages - 1)
        else:
            return tile

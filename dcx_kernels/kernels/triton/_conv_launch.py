"""One launch of the convolution kernel: its operands' strides, its flags, its grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcx_kernels.kernels import tiles
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton import conv
from dcx_kernels.kernels.triton._geometry import Axis
from dcx_kernels.kernels.triton._launch import aligned, cdiv, on

__all__ = ["ConvLaunch", "Lists", "precision", "same_strides"]


class Lists(NamedTuple):
    """Index lists of a full weight: (k,), (c,), or one row for each sample."""

    out: Tensor | None
    in_: Tensor | None

    @property
    def per_sample(self) -> bool:
        """Whether every sample has sets of its own."""
        return any(idx is not None and idx.dim() == 2 for idx in self)


class ConvLaunch:
    """Prepare ``dst = src * weight``; calling it launches the kernel once for each phase.

    Args:
        src: x, or dy for dgrad; (N, i, SH, SW).
        weight: full (K, C / G, R, S) with ``lists``, or packed.
        dst: what is written; (N, j, P, Q).
        groups: groups that exist.
        backward: dgrad: ``src`` has the out channels of the weight.
        phases: how pixels and taps meet, see `Axis`.
        one_by_one: reduce over one sample at a time.
    """

    def __init__(
        self,
        src: Tensor,
        weight: Tensor,
        dst: Tensor,
        lists: Lists,
        groups: int,
        backward: bool,
        phases: Sequence[tuple[Axis, Axis]],
        one_by_one: bool = False,
    ) -> None:
        self.src, self.dst = aligned(src), dst
        self.weight = _readable(weight, lists, src)
        self.lists, self.groups, self.backward, self.phases = lists, groups, backward, phases
        self.sets = src.shape[0] if lists.per_sample or one_by_one else 1
        self.samples = src.shape[0] // self.sets
        self.num_i, self.num_j = src.shape[1] // groups, dst.shape[1] // groups
        pixels = max(a.size * b.size for a, b in phases) if phases else 0
        rows = self.samples * pixels
        self._tile = tiles.conv_tile(rows, self.num_j, self.num_i, src.element_size())
        self.bias: Tensor | None = None
        self._source = conv.PLAIN
        self._src_y: Tensor | None = None
        self._vectors: list[Tensor | None] = [None] * 5
        self._dst_y: Tensor | None = None
        self._dst_norm: Sequence[Tensor | None] = (None, None, None)
        self._partial: Tensor | None = None

    @property
    def tile(self) -> tiles.Tile:
        """Return the tile, made to fit what is loaded and fused."""
        pairs = self._src_y is not None
        through_lists = self.lists != (None, None)
        return tiles.fitted(
            "conv",
            self._tile,
            self.src.element_size(),
            scalar=not all(self._aligned.values()) or (pairs and through_lists),
            pairs=pairs,
            epilogue=self._partial is not None,
        )

    # --- what is fused ----------------------------------------------------------------------------

    def activate(self, norm: Norm) -> None:
        """Apply norm and ReLU to the source while it is loaded."""
        self._source, self._vectors = conv.ACTIVATE, [*norm, None, None]

    def undo(self, grad: NormGrad) -> None:
        """Take the source for the gradient behind a norm."""
        src, y = same_strides(self.src, grad.y)
        self.src, self._src_y = aligned(src), aligned(y)
        if grad.norm is None:
            self._source, scale, shift = conv.BEFORE, None, None
        else:
            self._source = conv.BEHIND_RELU if grad.relu else conv.BEHIND
            scale, shift = grad.norm.scale, grad.norm.shift
        self._vectors = [scale, grad.center, shift, grad.slope, grad.offset]

    def mask(self, x: Tensor, norm: Norm) -> Tensor:
        """Take the gradient behind the norm (with ReLU) of ``x``, which has the strides of dst.

        Returns:
            Sums to be, (sets, tiles, 2, c): of the gradients of the norm's scale and shift.
        """
        self._dst_y, self._dst_norm = x, norm
        return self._reduce()

    def measure(self) -> Tensor:
        """Measure moments of dst.

        Returns:
            Moments to be, (tiles, 2, k): mean and sum of squared differences.
        """
        return self._reduce()[0]

    def _reduce(self) -> Tensor:
        tiles_m = sum(self._tiles(phase) for phase in self.phases)
        shape = (self.sets, tiles_m, 2, self.dst.shape[1])
        self._partial = torch.empty(shape, dtype=torch.float32, device=self.src.device)
        return self._partial

    # --- the launch -------------------------------------------------------------------------------

    def _tiles(self, phase: tuple[Axis, Axis]) -> int:
        return cdiv(self.samples * phase[0].size * phase[1].size, self.tile.rows)

    def __call__(self) -> None:
        """Launch."""
        first_tile = 0
        flags = self._flags()
        tiles_j = cdiv(self.num_j, flags["BLOCK_J"])
        with on(self.src):
            for phase in self.phases:
                tiles_m = self._tiles(phase)
                grid = (tiles_m * tiles_j * self.groups * self.sets,)
                conv.channel_conv2d_kernel[grid](*self._arguments(phase, first_tile), **flags)
                first_tile += tiles_m

    def _arguments(self, phase: tuple[Axis, Axis], first_tile: int) -> tuple[Any, ...]:
        vertical, horizontal = phase
        out_stride, in_stride, row, column = self.weight.stride()
        i_idx, j_idx = self.lists.in_, self.lists.out
        stride_wi, stride_wj = in_stride, out_stride
        if self.backward:
            i_idx, j_idx, stride_wi, stride_wj = j_idx, i_idx, out_stride, in_stride
        sn, sc, sh, sw = self.src.stride()
        dn, dc, dh, dw = self.dst.stride()
        partials = 0 if self._partial is None else self._partial.shape[1]
        return (
            self.src, self._src_y, sn, sh, sw, sc, self.src.shape[2], self.src.shape[3],
            *self._vectors,
            self.weight, vertical.first * row + horizontal.first * column, stride_wi, stride_wj,
            vertical.step * row, horizontal.step * column,
            i_idx, j_idx, _row_stride(i_idx), _row_stride(j_idx), self.weight.shape[1],
            self.dst, vertical.out_offset * dh + horizontal.out_offset * dw,
            dn, vertical.out_stride * dh, horizontal.out_stride * dw, dc, self.bias,
            self._dst_y, *self._dst_norm,
            self._partial, first_tile, partials,
            vertical.size, horizontal.size, vertical.src_stride, horizontal.src_stride,
            vertical.base, horizontal.base, vertical.tap_step, horizontal.tap_step,
            vertical.taps, horizontal.taps,
            self.samples, self.num_i, self.num_j, self.groups,
        )  # fmt: skip

    def _flags(self) -> dict[str, Any]:
        tile = self.tile
        return {
            "SOURCE": self._source,
            "MOMENTS": self._partial is not None and self._dst_y is None,
            "MASK": self._dst_y is not None,
            "J_IS_IN": self.backward,
            "CHANNELS_LAST": self._channels_last,
            "ALIGNED_I": self._aligned["i"],
            "ALIGNED_J": self._aligned["j"],
            "W_UNIT": self._unit,
            "VECTOR": self._vector,
            "PRECISION": precision(self.src),
            "BLOCK_M": tile.rows,
            "BLOCK_J": tile.out,
            "BLOCK_I": tile.inner,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    @property
    def _vector(self) -> int:
        return 16 // self.src.element_size()

    @property
    def _channels_last(self) -> bool:
        return self.src.stride(1) == 1 and self.dst.stride(1) == 1

    @property
    def _unit(self) -> str:
        """Along which channels of the product the weight is contiguous."""
        if self.weight.stride(1) != 1 or self.lists != (None, None):
            return ""
        return "j" if self.backward else "i"

    @cached_property
    def _aligned(self) -> dict[str, bool]:
        """Whether 16-byte accesses are possible on either side."""
        weight = [self.weight.stride(d) for d in (0, 2, 3) if self.weight.shape[d] > 1]
        aligned_ = {}
        for side, x, channels in (("i", self.src, self.num_i), ("j", self.dst, self.num_j)):
            strides = [x.stride(d) for d in (0, 2, 3) if x.shape[d] > 1]
            steps = [channels, *strides, *(weight if self._unit == side else ())]
            whole = all(step % self._vector == 0 for step in steps)
            aligned_[side] = self._channels_last and whole
        return aligned_


def precision(x: Tensor) -> str:
    """Return how fp32 products are computed, as torch's switch for convolutions says."""
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return "tf32" if tf32 else "ieee"


def same_strides(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the strides of b if that is dense, copying what has others."""
    if a.stride() == b.stride():
        return a, b
    like = torch.empty_like(b)
    if like.stride() != b.stride():
        b = like.copy_(b)
    return (a if a.stride() == b.stride() else torch.empty_like(b).copy_(a)), b


def _readable(weight: Tensor, lists: Lists, src: Tensor) -> Tensor:
    """Return a packed weight with contiguous channels: a small copy, for 16-byte loads of it."""
    if lists != (None, None) or src.stride(1) != 1 or weight.shape[1] == 1:
        return aligned(weight)
    return aligned(weight.contiguous(memory_format=torch.channels_last))


def _row_stride(idx: Tensor | None) -> int:
    return idx.stride(0) if idx is not None and idx.dim() == 2 else 0

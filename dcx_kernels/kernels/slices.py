"""Active slices of parameters: which entries of a full tensor exist, and in which order.

A network has hundreds of parameters, most of them small, and each has another slice at every step.
So a backend moves and updates those of all layers in one call; `reference.slices` defines the
functions. They take lists that run in parallel; a slice of None is everything:

- ``gather_slices(dense, slices, out=None)``: copies of the slices, packed;
- ``scatter_slices_(dense, packed, slices)``: writes packed slices back;
- ``sgd_slices_`` and ``adamw_slices_``: update parameters and their state at the slices, in place.

What is not in a slice is neither read nor written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scratch", "Slice"]


class Slice:
    """The active slice of a parameter; packed, its channels follow each other in list order.

    Args:
        shape: of the full tensor: (K, C / groups, ...), (K, C * inner), or (K,).
        out_idx: active output channels, sorted (k,) int64, or None for all.
        in_idx: active input channels, sorted (c,) int64, or None for all.
        groups: groups of the convolution.
        active_groups: groups that exist; they have equally many active channels.
        inner: entries of the second axis per input channel, of a linear weight.

    Attributes:
        packed_shape: (k, c / active_groups, ...), (k, c * inner), or (k,).
        kept: what the reference makes of the slice: a list of rows.
    """

    __slots__ = (
        "active_groups", "groups", "in_idx", "inner", "kept", "out_idx", "packed_shape", "shape",
    )  # fmt: skip

    def __init__(
        self,
        shape: Sequence[int],
        out_idx: Tensor | None,
        in_idx: Tensor | None = None,
        groups: int = 1,
        active_groups: int = 1,
        inner: int = 1,
    ) -> None:
        assert out_idx is not None or (in_idx is not None and len(shape) > 1)
        self.shape = tuple(shape)
        self.groups, self.active_groups, self.inner = groups, active_groups, inner
        # kernels read them by their address
        self.out_idx = None if out_idx is None else out_idx.contiguous()
        self.in_idx = None if in_idx is None else in_idx.contiguous()
        packed = list(shape)
        if out_idx is not None:
            packed[0] = out_idx.shape[0]
        if in_idx is not None and active_groups:  # none exists of a depthwise filter of no channel
            packed[1] = in_idx.shape[0] // active_groups * inner
        self.packed_shape = tuple(packed)
        self.kept: Any = None

    @property
    def numel(self) -> int:
        """Entries in the slice."""
        return math.prod(self.packed_shape)

    @property
    def per_channel(self) -> tuple[int, ...]:
        """The full shape with an axis of its own for input channels: (K, C / groups, ...)."""
        if self.inner == 1:
            return self.shape
        return (self.shape[0], self.shape[1] // self.inner, self.inner)


class Scratch:
    """Persistent memory for gathered state tensors: fresh memory costs a page fault every 4 kB."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._used: dict[tuple[torch.device, torch.dtype], int] = {}

    def take(self, numel: int, like: Tensor) -> Tensor:
        """Return ``numel`` flat elements like those of ``like``, valid until `release`."""
        key = (like.device, like.dtype)
        start = self._used.get(key, 0)
        self._used[key] = start + numel
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < start + numel:
            return like.new_empty(numel)
        return buffer[start : start + numel]

    def release(self) -> None:
        """Take everything back; what did not fit this time fits the next."""
        for key, used in self._used.items():
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < used:
                self._buffers[key] = torch.empty(used, device=key[0], dtype=key[1])
        self._used.clear()

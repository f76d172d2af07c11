"""Where compact tensors meet or part: run-time modules between the layers of a sparse network."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dcx_kernels.channel_set import agree, mark_any_length
from dcx_kernels.graph.layout import Ids
from dcx_kernels.graph.sets import ActiveSets
from dcx_kernels.graph.walk import Join, Select
from dcx_kernels.ops.gather import GatherChannelsFunction
from dcx_kernels.ops.union_add import union_add

__all__ = ["ChannelSelect", "ChannelUnionAdd", "Joint", "make_joint", "places", "selection"]


class Joint(Protocol):
    """A module without parameters that index lists tell what to do."""

    def lists(self, sets: ActiveSets) -> list[Ids]:
        """Return its index lists for the current sets."""

    def take(self, lists: list[Tensor]) -> None:
        """Receive them, on the device."""


def places(sets: ActiveSets, whole: Ids) -> Ids:
    """Return the place of every channel of ``whole`` in its compact tensor (if it is there)."""
    return np.cumsum(sets.mask(whole)) - 1


def selection(sets: ActiveSets, source: Ids, positions: Ids, out: Ids) -> tuple[Ids, int | None]:
    """Return which channels of a compact source follow each other in a `Select`'s output.

    And, where they form one run, where it starts.
    """
    index = places(sets, source)[positions[sets.mask(out)]]
    start = int(index[0]) if len(index) else 0
    run = np.array_equal(index, np.arange(start, start + len(index)))
    return index, start if run else None


class ChannelUnionAdd(nn.Module):
    """Sum over the union of both terms' channels (see `ops.union_add`)."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self._terms = [layout.ids for _, layout in join.terms]
        self._out = join.out.ids
        self.a_idx = self.b_idx = self.out_idx = torch.empty(0, dtype=torch.int64)

    def lists(self, sets: ActiveSets) -> list[Ids]:
        """Return the terms' places in the sum, and the sum's channels."""
        place = places(sets, self._out)
        count = int(sets.mask(self._out).sum())
        return [*(place[sets.mask(term)] for term in self._terms), np.arange(count)]

    def take(self, lists: list[Tensor]) -> None:
        """Receive the index lists."""
        self.a_idx, self.b_idx, self.out_idx = lists
        for idx in lists:
            mark_any_length(idx, 0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Add (N, a, ...) and (N, b, ...): (N, u, ...)."""
        assert agree(a.shape[1], self.a_idx.shape[0]) and agree(b.shape[1], self.b_idx.shape[0])
        width = self.out_idx.shape[0]
        torch._check(width >= 1)  # torch.compile knows no more of it
        return union_add(a, b, self.a_idx, self.b_idx, width)


class ChannelSelect(nn.Module):
    """Slice, chunk or shuffle of a compact tensor."""

    def __init__(self, select: Select) -> None:
        super().__init__()
        self._source, self._out = select.layout.ids, select.out.ids
        self._positions = select.positions
        self.index = torch.empty(0, dtype=torch.int64)
        self.start: int | None = None

    def lists(self, sets: ActiveSets) -> list[Ids]:
        """Return which channels of the source follow each other in the output."""
        index, self.start = selection(sets, self._source, self._positions, self._out)
        return [index]

    def take(self, lists: list[Tensor]) -> None:
        """Receive the index list."""
        (self.index,) = lists
        mark_any_length(self.index, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, ...) -> (N, k, ...); a run of channels is a view."""
        if not torch.compiler.is_compiling() and self.start is not None:
            return x.narrow(1, self.start, self.index.shape[0])
        y: Tensor = GatherChannelsFunction.apply(x, self.index, 1)
        return y


def make_joint(step: Join | Select) -> ChannelUnionAdd | ChannelSelect:
    """Return the module of a step."""
    return ChannelUnionAdd(step) if isinstance(step, Join) else ChannelSelect(step)

"""How the channels of all groups lie behind each other in one flat tensor.

Selection prefers `index_select` and `scatter_` to indexing, which starts torch's threads for a few
thousand elements already: cheap on an idle machine, but on a busy one it waits milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet

__all__ = ["GroupLayout"]


@dataclass(frozen=True)
class GroupLayout:
    """Group names and sizes in order; selectors keep one flat entry per channel of them all.

    Args:
        names: groups in order, which is also the order in which ties are broken.
        sizes: channels of each group.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @cached_property
    def num_channels(self) -> int:
        """Channels of all groups together: the N of the papers."""
        return sum(self.sizes)

    @cached_property
    def group_of(self) -> Tensor:
        """Group number of each channel, (N,) int64."""
        return self.segments(self.sizes)

    @cached_property
    def first(self) -> Tensor:
        """Flat position of the first channel of each group, (G,) int64."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return sizes.cumsum(0) - sizes

    @cached_property
    def rank(self) -> Tensor:
        """Index of each channel in its own group, (N,) int64."""
        return torch.arange(self.num_channels) - self.first.index_select(0, self.group_of)

    def segments(self, counts: tuple[int, ...] | list[int]) -> Tensor:
        """Return group number g repeated ``counts[g]`` times, for every group; int64."""
        repeats = torch.tensor(counts, dtype=torch.int64)
        return torch.arange(len(self.sizes)).repeat_interleave(repeats)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a copy of each group's part of ``flat``, (N,)."""
        parts = torch.split(flat, list(self.sizes))
        return {name: part.clone() for name, part in zip(self.names, parts, strict=True)}

    def sets(self, mask: Tensor) -> dict[str, ChannelSet]:
        """Return the channel sets of ``mask``, (N,) bool with at least one channel a group.

        The index lists are views of one tensor, so that they can go to a device in one copy.
        """
        flat = mask.nonzero().flatten()
        groups = self.group_of.index_select(0, flat)
        counts = torch.bincount(groups, minlength=len(self.sizes)).tolist()
        parts = torch.split(flat - self.first.index_select(0, groups), counts)
        return {
            name: ChannelSet.trusted(part, size)
            for name, size, part in zip(self.names, self.sizes, parts, strict=True)
        }

    def mask(self, sets: Mapping[str, ChannelSet]) -> Tensor:
        """Return the flat bool mask of ``sets``, (N,); the inverse of `sets`."""
        return torch.cat([sets[name].mask().cpu() for name in self.names])

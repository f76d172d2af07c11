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
from dcx_kernels.errors import expected

__all__ = ["GroupLayout"]


@dataclass(frozen=True)
class GroupLayout:
    """Group names and sizes in order; selectors keep one flat entry per channel of them all.

    The channels of a group may form several equal consecutive *runs*, because a grouped
    convolution reads or writes them. An active set holds as many channels in each run as in the
    others, so it is made of *rows*: a row is one channel of every run. With one run a row is a
    channel.

    Args:
        names: groups in order, which is also the order in which ties are broken.
        sizes: channels of each group.
        runs: runs of each group; 1 where any set is allowed.

    Raises:
        ValueError: naming the group whose channels do not divide into its runs.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    runs: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, size, runs in zip(self.names, self.sizes, self.runs, strict=True):
            if type(runs) is not int or runs < 1 or size % runs:
                what = f"a number of runs that divides the {size} channels"
                raise ValueError(expected(what, repr(runs), where=name))

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

    @cached_property
    def rows(self) -> GroupLayout:
        """The same groups with their rows as channels; this layout itself if it has no runs."""
        if max(self.runs, default=1) == 1:
            return self
        counts = tuple(size // runs for size, runs in zip(self.sizes, self.runs, strict=True))
        return GroupLayout(self.names, counts, (1,) * len(counts))

    @cached_property
    def runs_of_row(self) -> Tensor:
        """Channels of each row of all groups, (R,) int64."""
        return torch.tensor(self.runs).index_select(0, self.rows.group_of)

    @cached_property
    def run_of(self) -> Tensor:
        """Run of each channel, counted over all groups, (N,) int64."""
        lengths = torch.tensor(self.rows.sizes).repeat_interleave(torch.tensor(self.runs))
        return torch.arange(lengths.numel()).repeat_interleave(lengths)

    @cached_property
    def row_of_place(self) -> Tensor:
        """Row of each flat position once the channels of every run are in order, (N,) int64."""
        counts = torch.tensor(self.rows.sizes).index_select(0, self.group_of)
        return self.rows.first.index_select(0, self.group_of) + self.rank % counts

    def floors(self, min_active: int) -> list[int]:
        """Return the least rows of each group that hold ``min_active`` channels, or all it has."""
        return [
            -(-min(min_active, size) // runs)
            for size, runs in zip(self.sizes, self.runs, strict=True)
        ]

    def run_counts(self, mask: Tensor) -> list[list[int]]:
        """Return for each group the channels that ``mask``, (N,) bool, has in each of its runs."""
        counts = torch.bincount(self.run_of[mask], minlength=sum(self.runs))
        return [part.tolist() for part in torch.split(counts, list(self.runs))]

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

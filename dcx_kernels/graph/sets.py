"""From the sets of groups to those of every axis: all layers in one vectorised pass.

Concatenations, slices, shuffles and sums make sets that belong to no group. They are computed on
the host, anew only where one of their groups changed, and their index lists share one buffer, so
that they go to a device in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet, mark_any_length
from dcx_kernels.graph.layout import Ids, Layout
from dcx_kernels.graph.structure import Structure

__all__ = ["ActiveSets", "owned", "upload"]


class ActiveSets:
    """The active set of every layer's axes; equal axes share one `ChannelSet`.

    Args:
        structure: the network.
        others: further layouts whose sets are wanted.
    """

    def __init__(self, structure: Structure, others: Sequence[Layout] = ()) -> None:
        self._structure = structure
        layouts = [side for axes in structure.axes.values() for side in (axes.out, axes.in_)]
        layouts += others
        self._start = {name: int(ids[0]) for name, ids in structure.channels.items()}
        groups = {ids.tobytes(): name for name, ids in structure.channels.items()}
        self._key = {layout: layout.ids.tobytes() for layout in layouts}
        self._group: dict[bytes, str] = {}
        mixed: dict[bytes, Ids] = {}
        self._sets: dict[bytes, ChannelSet | None] = {}
        for layout, key in self._key.items():
            if key in groups:
                self._group[key] = groups[key]
            elif structure.free[layout.ids].any():
                mixed[key] = layout.ids
            else:
                self._sets[key] = None
        self._mixed, self._sizes = list(mixed), np.array([len(ids) for ids in mixed.values()])
        self._ends = np.cumsum(self._sizes)
        self._ids = np.concatenate([*mixed.values(), np.empty(0, np.int64)])  # of all mixed layouts
        self._mask = np.zeros(len(structure.free), dtype=bool)
        self._active: Mapping[str, ChannelSet] = {}  # of which _mask is still to be made

    def update(self, active: Mapping[str, ChannelSet]) -> None:
        """Compute what follows from the groups' sets; an unchanged set stays the same object."""
        for key, name in self._group.items():
            self._sets[key] = active.get(name)
        if not self._mixed:
            self._active = active
            return
        before, self._mask = self._mask, self._new_mask(active)
        starts = self._ends - self._sizes
        moved = np.logical_or.reduceat((self._mask != before)[self._ids], starts)
        places = np.flatnonzero(self._mask[self._ids])
        ends = np.searchsorted(places, self._ends)
        places -= np.repeat(starts, np.diff(ends, prepend=0))
        device = next(iter(active.values())).indices.device
        lists = np.split(places, ends[:-1])
        changed = [n for n, key in enumerate(self._mixed) if moved[n] or key not in self._sets]
        for n, indices in zip(changed, upload([lists[n] for n in changed], device), strict=True):
            self._sets[self._mixed[n]] = ChannelSet.trusted(indices, int(self._sizes[n]), True)

    def _new_mask(self, active: Mapping[str, ChannelSet]) -> NDArray[np.bool_]:
        mask = ~self._structure.free
        starts = [self._start[name] for name in active]
        chosen = torch.cat([one.indices for one in active.values()]).cpu().numpy()
        mask[chosen + np.repeat(starts, [len(one) for one in active.values()])] = True
        for union in self._structure.unions:  # each behind its terms
            mask[union.ids] = np.any([mask[part] for part in union.parts], axis=0)
        return mask

    def __getitem__(self, layout: Layout) -> ChannelSet | None:
        """Return the set of a layout; None where all its channels exist for good."""
        return self._sets[self._key[layout]]

    def mask(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which channels are active, on the host."""
        if self._active:
            self._mask, self._active = self._new_mask(self._active), {}
        return self._mask[ids]

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveSets:
        new = ActiveSets(self._structure, list(self._key))
        new._mask, new._active, new._sets = self._mask, self._active, dict(self._sets)
        return new


def upload(lists: Sequence[Ids], device: torch.device | str) -> list[Tensor]:
    """Move index lists to a device, all in one copy; see `owned`."""
    if not lists:
        return []
    together = torch.from_numpy(np.concatenate(lists)).to(device, non_blocking=True)
    sizes = [len(part) for part in lists]
    parts: list[Tensor] = torch.ops.aten.split_with_sizes_copy(together, sizes)
    return parts


def owned(new: ChannelSet, taken: set[int]) -> ChannelSet:
    """Return the set, or a copy if its index list is a view or one of ``taken`` (by ``id``).

    torch.compile takes both for granted - where a list starts in its storage, and which lists are
    one - and compiles anew when they change. A selector's lists are views of one tensor.
    """
    if new.indices._is_view() or id(new.indices) in taken:
        new = ChannelSet.trusted(new.indices.clone(), new.num_channels)
    mark_any_length(new.indices, 0)  # it may be older than the need for it
    taken.add(id(new.indices))
    return new

"""The global top-k over the channels of all groups, on the device that the scores are on.

Every shape is known beforehand: nothing waits for the device, and a captured graph serves every
outcome. Group sizes are constants of a network, so that what depends on them alone is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GroupPlaces", "group_places", "select_channels"]


class GroupPlaces(NamedTuple):
    """Where groups lie that stand end to end.

    Attributes:
        bounds: (groups + 1,) int64, the first channel of each group, then the total.
        group_of: (total,) int64, group of each channel.
        rank: (total,) int64, index of each channel in its group.
    """

    bounds: Tensor
    group_of: Tensor
    rank: Tensor


# never evicted: captured graphs go on reading these tensors. The first call copies to the device,
# and waits for that, so that every stream may read them
@cache
def group_places(sizes: tuple[int, ...], device: torch.device) -> GroupPlaces:
    """Return the places of groups of these sizes; the same tensors each time, not to be written."""
    counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    group_of = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
    rank = torch.arange(group_of.shape[0], device="cpu") - bounds.index_select(0, group_of)
    return GroupPlaces(bounds.to(device), group_of.to(device), rank.to(device))


def select_channels(
    scores: Tensor, sizes: Sequence[int], budget: int, min_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``budget`` best channels of all groups, at least ``min_active`` of each.

    Ties go to the lower group, then to the lower index; NaN counts as -inf.

    Args:
        scores: of all groups, end to end.
        sizes: channels of each group, at least 1; their sum is ``total``.
        budget: channels to choose, within what ``min_active`` and the sizes allow.
        min_active: least channels of a group (all, if it has fewer).

    Returns:
        For each group, from its first place on, its active channels in ascending order, then -1;
        the place of each channel in that list, or -1; the number of active channels of each group.

    Shape:
        scores: (total,) floating -> (total,), (total,), (groups,) int64.
    """
    places = group_places(tuple(sizes), scores.device)
    least = sum(min(min_active, size) for size in sizes)
    numbers = torch.where(scores.isnan(), -torch.inf, scores.detach())
    # stable: equal scores stay in flat order, i.e. lower group, then lower index
    order = torch.sort(numbers, descending=True, stable=True).indices
    groups = places.group_of.index_select(0, order)
    by_group = torch.sort(groups, stable=True).indices
    forced = torch.empty_like(groups).scatter_(0, by_group, places.rank) < min_active
    chosen = forced | ((~forced).cumsum(0) <= budget - least)
    mask = torch.empty_like(chosen).scatter_(0, order, chosen)

    until = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    at_bounds = until.index_select(0, places.bounds)
    counts = at_bounds.diff()
    before = until[:-1] - at_bounds.index_select(0, places.group_of)
    inverse = torch.where(mask, before, -1)
    # the others follow behind the active ones, so that every place is written exactly once
    behind = counts.index_select(0, places.group_of) + places.rank - before
    first = places.bounds.index_select(0, places.group_of)
    place = first + torch.where(mask, before, behind)
    indices = torch.empty_like(place).scatter_(0, place, torch.where(mask, places.rank, -1))
    return indices, inverse, counts

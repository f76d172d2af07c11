"""Which rows to take when they weigh differently and the budget should be met exactly."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["best_rows", "largest_sum"]


def largest_sum(weights: Sequence[int], counts: Sequence[int], limit: int) -> int:
    """Return the largest sum up to ``limit`` of at most ``counts[i]`` times ``weights[i]``."""
    return _sums(zip(weights, counts, strict=True), limit).bit_length() - 1


def best_rows(groups: Tensor, weights: Sequence[int], limit: int) -> list[int]:
    """Choose rows of the largest weight within ``limit``, the best ones the ranking allows.

    Row after row is taken, best first, unless the rest could not reach that weight any more: among
    all choices of that weight this is the one whose first difference to any other is in its
    favour. The rows of one group weigh the same, so they are taken in order.

    Args:
        groups: group of each row, best row first.
        weights: channels of a row of each group.
        limit: most channels to choose.

    Returns:
        rows of each group.

    Shape:
        groups: (number of rows,) int64.
    """
    if len(set(weights)) == 1:
        return _count(groups[: limit // weights[0]], weights)
    total = largest_sum(weights, _count(groups, weights), limit)
    weight = torch.tensor(weights).index_select(0, groups)
    taken = [0] * len(weights)
    while total:
        length, weighs = _longest_start(weight, total)
        taken = [a + b for a, b in zip(taken, _count(groups[:length], weights), strict=True)]
        total -= weighs
        # the row that ended the start cannot be taken, nor can later ones of its weight
        others = (weight[length:] != weight[length : length + 1]).nonzero().flatten() + length
        groups, weight = groups.index_select(0, others), weight.index_select(0, others)
    return taken


def _longest_start(weight: Tensor, total: int) -> tuple[int, int]:
    """Return how many rows can be taken from the start, and what they weigh.

    After them the rest can still fill ``total`` exactly. It can after fewer rows as well, since
    those left out may be taken after all: that is why bisection finds the longest start.
    """
    weighs = [0, *weight.cumsum(0).tolist()]

    def too_long(length: int) -> bool:
        left = total - weighs[length]
        copies = torch.bincount(weight[length:]).tolist() if left > 0 else []
        return left < 0 or not _sums(enumerate(copies), left) >> left

    length = bisect_left(range(len(weighs)), True, key=too_long) - 1
    assert length >= 0, "no rows have this total"
    return length, weighs[length]


def _count(groups: Tensor, weights: Sequence[int]) -> list[int]:
    counts: list[int] = torch.bincount(groups, minlength=len(weights)).tolist()
    return counts


def _sums(items: Iterable[tuple[int, int]], limit: int) -> int:
    """Return the sums up to ``limit`` of (weight, most copies) as bits: bit s stands for s."""
    sums, within = 1, (1 << limit + 1) - 1
    for weight, left in items:
        part = 1
        while left > 0:
            # 1, 2, 4, ... copies and the rest make every number of copies
            copies = min(part, left)
            sums |= sums << copies * weight & within
            left -= copies
            part *= 2
    return sums

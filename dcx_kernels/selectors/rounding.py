"""Group widths on a grid of multiples, at a constant sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["round_widths"]


def round_widths(
    widths: Sequence[int],
    sizes: Sequence[int],
    floors: Sequence[int],
    round_to: int,
    runs: Sequence[int] | None = None,
) -> list[int]:
    """Move ``widths`` to multiples of ``round_to`` without changing their sum.

    A group whose channels form runs has widths that are multiples of their number, always; on the
    grid they are multiples of the least common multiple of both.

    Only four things can keep a width off the grid, all of them arithmetic:

    - The sum is no multiple. One group then takes the whole remainder (positive or negative): the
      one that so ends nearest to its own width; ties go to the lower group. A group that is off
      the grid anyway takes it first, if it has room.
    - A group has no multiple between its floor and its size (it is smaller than the grid, say).
      It keeps its own width, but for what the sum asks of it.
    - The sum lies outside what multiples can reach: so small that not every group can have
      ``round_to`` channels, or so large that groups whose size is no multiple must be complete.
      Then groups leave the grid, first those that a multiple would move furthest, until it is in
      reach. (A heuristic: a search for the fewest groups would cost more than a step allows.)
    - Groups with runs cannot take what is left over, and no other group has room for it. Then
      groups go back to their own widths, those furthest from them first, until the sum is right.
      (A heuristic again: grids of different groups are not searched for a sum that fits.)

    Args:
        widths: channels each group would get, with ``floors <= widths <= sizes``.
        sizes: channels each group has.
        floors: least channels each group must keep, at least 1.
        round_to: the grid.
        runs: runs of each group, which divide its width, size and floor; None for one each.

    Returns:
        the new widths: same sum, between floors and sizes.
    """
    runs = runs or [1] * len(widths)
    grids = [math.lcm(round_to, r) for r in runs]
    low = [-(-floor // grid) * grid for floor, grid in zip(floors, grids, strict=True)]
    high = [size // grid * grid for size, grid in zip(sizes, grids, strict=True)]
    on_grid = _groups_on_grid(widths, sizes, floors, low, high)
    new = list(widths)
    for g in on_grid:
        nearest = (widths[g] + grids[g] // 2) // grids[g] * grids[g]
        new[g] = min(max(nearest, low[g]), high[g])
    missing = sum(widths) - sum(new)

    def moved(g: int) -> int:
        return new[g] + (grids[g] if missing > 0 else -grids[g])

    def cost(g: int) -> tuple[int, int]:
        return abs(moved(g) - widths[g]) - abs(new[g] - widths[g]), g

    while movable := [
        g for g in on_grid if grids[g] <= abs(missing) and low[g] <= moved(g) <= high[g]
    ]:
        chosen = min(movable, key=cost)
        missing, new[chosen] = missing + new[chosen] - moved(chosen), moved(chosen)
    while (placed := _place_remainder(new, widths, sizes, floors, runs, on_grid, missing)) is None:
        furthest = max(range(len(new)), key=lambda g: (abs(new[g] - widths[g]), -g))
        missing += new[furthest] - widths[furthest]
        new[furthest] = widths[furthest]
        on_grid = [g for g in on_grid if g != furthest]
    return placed


def _groups_on_grid(
    widths: Sequence[int],
    sizes: Sequence[int],
    floors: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
) -> list[int]:
    """Return the groups that can be multiples while the sum stays within reach."""
    budget = sum(widths)
    grid = {g for g in range(len(widths)) if low[g] <= high[g]}
    least = sum(low[g] if g in grid else floors[g] for g in range(len(widths)))
    most = sum(high[g] if g in grid else sizes[g] for g in range(len(widths)))
    while least > budget:
        released = max(grid, key=lambda g: (low[g] - widths[g], -g))
        grid.remove(released)
        least += floors[released] - low[released]
        most += sizes[released] - high[released]
    while most < budget:
        released = max(grid, key=lambda g: (widths[g] - high[g], -g))
        grid.remove(released)
        most += sizes[released] - high[released]
    return sorted(grid)


def _place_remainder(
    new: Sequence[int],
    widths: Sequence[int],
    sizes: Sequence[int],
    floors: Sequence[int],
    runs: Sequence[int],
    on_grid: list[int],
    missing: int,
) -> list[int] | None:
    """Add ``missing`` to as few of the widths ``new`` as possible; None if it has no place."""
    placed = list(new)
    if not missing:
        return placed
    loose = [g for g in range(len(new)) if g not in on_grid]
    for candidates in (loose, on_grid):
        fitting = [
            g
            for g in candidates
            if floors[g] <= new[g] + missing <= sizes[g] and missing % runs[g] == 0
        ]
        if fitting:
            placed[min(fitting, key=lambda g: (abs(new[g] + missing - widths[g]), g))] += missing
            return placed
    for g in loose + on_grid:
        room = sizes[g] - new[g] if missing > 0 else new[g] - floors[g]
        part = min(room, abs(missing)) // runs[g] * runs[g]
        part = part if missing > 0 else -part
        placed[g] += part
        missing -= part
    return None if missing else placed

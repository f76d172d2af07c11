"""Group widths on a grid of multiples, at a constant sum."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["round_widths"]


def round_widths(
    widths: Sequence[int], sizes: Sequence[int], floors: Sequence[int], round_to: int
) -> list[int]:
    """Move ``widths`` to multiples of ``round_to`` without changing their sum.

    Only three things can keep a width off the grid, all of them arithmetic:

    - The sum is no multiple. One group then takes the whole remainder (positive or negative): the
      one that so ends nearest to its own width; ties go to the lower group. A group that is off
      the grid anyway takes it first, if it has room.
    - A group has no multiple between its floor and its size (it is smaller than ``round_to``, say).
      It keeps its own width, but for what the sum asks of it.
    - The sum lies outside what multiples can reach: so small that not every group can have
      ``round_to`` channels, or so large that groups whose size is no multiple must be complete.
      Then groups leave the grid, first those that a multiple would move furthest, until it is in
      reach. (A heuristic: a search for the fewest groups would cost more than a step allows.)

    Args:
        widths: channels each group would get, with ``floors <= widths <= sizes``.
        sizes: channels each group has.
        floors: least channels each group must keep, at least 1.
        round_to: the grid.

    Returns:
        the new widths: same sum, between floors and sizes.
    """
    low = [-(-floor // round_to) * round_to for floor in floors]
    high = [size // round_to * round_to for size in sizes]
    on_grid = _groups_on_grid(widths, sizes, floors, low, high)
    new = list(widths)
    for g in on_grid:
        nearest = (widths[g] + round_to // 2) // round_to * round_to
        new[g] = min(max(nearest, low[g]), high[g])
    missing = sum(widths) - sum(new)

    def cost(g: int, step: int) -> tuple[int, int]:
        return abs(new[g] + step - widths[g]) - abs(new[g] - widths[g]), g

    while abs(missing) >= round_to:
        step = round_to if missing > 0 else -round_to
        movable = [g for g in on_grid if low[g] <= new[g] + step <= high[g]]
        if not movable:
            break
        chosen = min(movable, key=lambda g: cost(g, step))
        new[chosen] += step
        missing -= step
    if missing:
        _place_remainder(new, widths, sizes, floors, on_grid, missing)
    return new


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
    new: list[int],
    widths: Sequence[int],
    sizes: Sequence[int],
    floors: Sequence[int],
    on_grid: list[int],
    missing: int,
) -> None:
    """Add ``missing`` to as few of the widths ``new`` as possible, in place."""
    loose = [g for g in range(len(new)) if g not in on_grid]
    for candidates in (loose, on_grid):
        fitting = [g for g in candidates if floors[g] <= new[g] + missing <= sizes[g]]
        if fitting:
            new[min(fitting, key=lambda g: (abs(new[g] + missing - widths[g]), g))] += missing
            return
    for g in loose + on_grid:
        moved = min(max(new[g] + missing, floors[g]), sizes[g]) - new[g]
        new[g] += moved
        missing -= moved
    assert missing == 0, "floors <= widths <= sizes was violated"

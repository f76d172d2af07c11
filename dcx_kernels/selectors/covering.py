"""Random sets, and random sets that see every channel once."""

from __future__ import annotations

import math
from operator import mul

import torch
from torch import Tensor

from dcx_kernels.selectors.layout import GroupLayout
from dcx_kernels.selectors.ranking import top_mask

__all__ = ["covering_mask", "covering_steps", "random_mask"]


def random_mask(
    layout: GroupLayout, budget: int, min_active: int, round_to: int, generator: torch.Generator
) -> Tensor:
    """Draw a random set of ``budget`` channels, (N,) bool; uniform if groups have no runs."""
    draw = torch.rand(layout.num_channels, dtype=torch.float64, generator=generator)
    return top_mask(draw, layout, budget, min_active, round_to)


def covering_steps(layout: GroupLayout, budget: int, min_active: int) -> int:
    """Return the fewest sets of ``budget`` channels that show every channel at least once.

    That is ceil(N / budget), unless ``min_active`` makes small groups repeat channels: in T sets
    a group takes up at least max(its size, T * min_active) places. Groups whose channels form runs
    do so in whole rows, of which only so many fit beside the least rows of all others. Where groups
    have different numbers of runs, this is a bound that sets cannot always reach: rows of different
    weight may not share out the budget without a remainder.
    """
    floors = layout.floors(min_active)
    spare = budget - sum(map(mul, floors, layout.runs))
    groups = list(zip(layout.rows.sizes, layout.runs, floors, strict=True))
    steps = -(-layout.num_channels // budget)
    while steps * budget < sum(
        runs * max(rows, steps * floor) for rows, runs, floor in groups
    ) or any(steps * (floor + spare // runs) < rows for rows, runs, floor in groups):
        steps += 1
    return steps


def covering_mask(
    seen: Tensor,
    steps_left: int,
    layout: GroupLayout,
    budget: int,
    min_active: int,
    round_to: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw the next set of a random partition of all channels.

    Channels not seen yet come first, in random order; when they run out (in the last set), seen
    ones fill up at random. So that ``min_active`` need not repeat channels while others wait, each
    group holds back ``min_active`` unseen channels for every later set as far as it has them; with
    that, `covering_steps` sets cover (proof: the places that later sets owe never exceed their
    budgets). ``round_to`` may take a few sets more, as it moves widths away from the draw.

    All this holds for the channels of each run, and for rows in place of channels: a set takes
    equally many of every run, so that their unseen channels run out together. Only groups with
    different numbers of runs may need more sets, see `covering_steps`.

    Args:
        seen: (N,) bool, channels that were active before.
        steps_left: sets still planned, this one included; at least 1.
        layout: where the groups lie.
        budget: channels of the set.
        min_active: least channels of a group.
        round_to: grid of the group widths.
        generator: source of the draw.

    Returns:
        (N,) bool, exactly ``budget`` of them true; fewer where unseen channels of groups with
        different numbers of runs leave a rest that nothing fits, for to see them comes first.
    """
    draw = torch.rand(layout.num_channels, dtype=torch.float64, generator=generator)
    # three tiers, random within each: [2, 3) unseen, [1, 2) unseen but held back, [0, 1) seen
    scores = torch.where(seen, draw, draw + 2)
    if steps_left > 1:
        floors = layout.floors(min_active)
        start = 0
        for size, runs, floor in zip(layout.sizes, layout.runs, floors, strict=True):
            group = slice(start, start + size)
            old = seen[group].view(runs, -1)
            held = min(int((~old).sum(1).min()), floor * (steps_left - 1))
            unseen = draw[group].view(runs, -1).masked_fill(old, math.inf)
            lowest = unseen.topk(held, dim=1, largest=False).indices
            own = scores[group].view(runs, -1)
            own.scatter_(1, lowest, own.gather(1, lowest) - 1)
            start += size
    return top_mask(scores, layout, budget, min_active, round_to, tiers=(2.0, 1.0))

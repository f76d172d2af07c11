"""Random sets, and random sets that see every channel once."""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.selectors.layout import GroupLayout
from dcx_kernels.selectors.ranking import top_mask

__all__ = ["covering_mask", "covering_steps", "random_mask"]


def random_mask(
    layout: GroupLayout, budget: int, min_active: int, round_to: int, generator: torch.Generator
) -> Tensor:
    """Draw a uniformly random set of ``budget`` channels, (N,) bool."""
    draw = torch.rand(layout.num_channels, dtype=torch.float64, generator=generator)
    return top_mask(draw, layout, budget, min_active, round_to)


def covering_steps(layout: GroupLayout, budget: int, min_active: int) -> int:
    """Return the fewest sets of ``budget`` channels that show every channel at least once.

    That is ceil(N / budget), unless ``min_active`` makes small groups repeat channels: in T sets
    a group takes up at least max(its size, T * min_active) places.
    """
    floors = [min(min_active, size) for size in layout.sizes]
    steps = -(-layout.num_channels // budget)
    while steps * budget < sum(
        max(size, steps * floor) for size, floor in zip(layout.sizes, floors, strict=True)
    ):
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

    Args:
        seen: (N,) bool, channels that were active before.
        steps_left: sets still planned, this one included; at least 1.
        layout: where the groups lie.
        budget: channels of the set.
        min_active: least channels of a group.
        round_to: grid of the group widths.
        generator: source of the draw.

    Returns:
        (N,) bool, exactly ``budget`` of them true.
    """
    draw = torch.rand(layout.num_channels, dtype=torch.float64, generator=generator)
    # three tiers, random within each: [2, 3) unseen, [1, 2) unseen but held back, [0, 1) seen
    scores = torch.where(seen, draw, draw + 2)
    if steps_left > 1:
        start = 0
        for size in layout.sizes:
            unseen = (~seen[start : start + size]).nonzero().flatten() + start
            held = min(unseen.numel(), min(min_active, size) * (steps_left - 1))
            lowest = draw[unseen].topk(held, largest=False).indices
            scores[unseen[lowest]] -= 1
            start += size
    return top_mask(scores, layout, budget, min_active, round_to)

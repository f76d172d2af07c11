"""One ranking over the channels of the whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import add, floordiv, lt, mul, sub

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import NonFiniteError, expected
from dcx_kernels.selectors.filling import best_rows, largest_sum
from dcx_kernels.selectors.layout import GroupLayout
from dcx_kernels.selectors.rounding import round_widths
from dcx_kernels.selectors.rows import form_rows

__all__ = ["channel_budget", "feasible_budget", "global_top", "top_mask"]


def channel_budget(num_channels: int, density: float) -> int:
    """Return the channels that ``density`` keeps out of ``num_channels``.

    The epsilon keeps products such as 0.29 * 100 = 28.999... from losing a channel.

    Raises:
        ValueError: if ``density`` is not in (0, 1].

    References:
        Dynamic Neural Network Channel Execution, section 2: 20 % of VGG-19's 5504 are 1100.
    """
    if not 0 < density <= 1:
        raise ValueError(expected("density in (0, 1]", density))
    return math.floor(density * num_channels + 1e-9)


def global_top(
    scores: Mapping[str, Tensor],
    budget: int,
    min_active: int = 1,
    round_to: int = 1,
    runs: Mapping[str, int] | None = None,
) -> dict[str, ChannelSet]:
    """Choose the ``budget`` best channels of all groups together.

    Ties go to the lower group in the mapping's order, then to the lower index. Each group keeps at
    least its ``min_active`` best channels (all, if it has fewer); those forced in displace the
    lowest-ranked others, the budget stays. With ``round_to`` the widths that result move to
    multiples at constant budget, see `rounding.round_widths`, and each group keeps its best.

    A group whose channels form several runs gets the same number in each of them. The best channels
    of its runs are its first row, the second best its second row, and so on. Rows are ranked by
    the mean of their scores and taken whole; what that does to the budget, `feasible_budget` says.

    Args:
        scores: group name -> one score a channel; floating, infinite allowed.
        budget: channels to choose, over all groups.
        min_active: least channels of a group; with runs, rounded up to whole rows.
        round_to: grid of the group widths; 1 for none.
        runs: group name -> equal consecutive runs of its channels; 1 for groups not named.

    Raises:
        ValueError: if the budget is out of reach, a score is not a 1-D floating tensor, or the
            runs of a group do not divide its channels.
        NonFiniteError: if a score is NaN.

    Shape:
        scores[name]: (num_channels,) -> indices of the set: (num_active,) int64 on the CPU.
    """
    for name, score in scores.items():
        if score.dim() != 1 or not score.is_floating_point() or not score.numel():
            got = f"{score.dtype} of shape {tuple(score.shape)}"
            raise ValueError(expected("1-D floating scores", got, where=name))
    sizes = tuple(score.numel() for score in scores.values())
    runs = runs or {}
    for name in runs:
        if name not in scores:
            raise ValueError(expected(f"runs of {list(scores)}", repr(name)))
    layout = GroupLayout(tuple(scores), sizes, tuple(runs.get(name, 1) for name in scores))
    budget = feasible_budget(layout, budget, min_active, round_to)
    flat = torch.cat([score.detach().to("cpu", torch.float64) for score in scores.values()])
    wrong = flat.isnan()
    if wrong.any():
        name = layout.names[int(layout.group_of[wrong][0])]
        raise NonFiniteError(expected("scores that are numbers", "NaN", where=name))
    return layout.sets(top_mask(flat, layout, budget, min_active, round_to))


def feasible_budget(layout: GroupLayout, budget: int, min_active: int, round_to: int) -> int:
    """Check what every global selection presumes; return how many channels it will choose.

    That is ``budget`` itself if every group has one run. Runs allow only some totals: it is the
    largest of them within the budget; or the least of them all, where already one channel in
    every run, and ``min_active`` rounded up to whole rows, exceed the budget.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    for argument, value in (("min_active", min_active), ("round_to", round_to)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(expected(f"{argument} to be an int of at least 1", repr(value)))
    if not layout.sizes:
        raise ValueError(expected("at least one selectable group", "none"))
    least = sum(min(min_active, size) for size in layout.sizes)
    if not least <= budget <= layout.num_channels:
        what = (
            f"a budget of {least} (min_active={min_active} in {len(layout.sizes)} groups) "
            f"to {layout.num_channels} channels"
        )
        raise ValueError(expected(what, budget))
    floors = layout.floors(min_active)
    least = sum(map(mul, floors, layout.runs))
    free = map(sub, layout.rows.sizes, floors)
    return least + largest_sum(layout.runs, list(free), max(0, budget - least))


def top_mask(
    scores: Tensor,
    layout: GroupLayout,
    budget: int,
    min_active: int,
    round_to: int,
    tiers: Sequence[float] = (),
) -> Tensor:
    """Do the work of `global_top` on flat, checked scores.

    Args:
        scores: (N,) float64 on the CPU, no NaN.
        layout: where the groups lie.
        budget: channels to choose; `feasible_budget` gave it.
        min_active: least channels of a group.
        round_to: grid of the group widths.
        tiers: falling scores at which a lower tier begins. Of each tier as many channels are chosen
            as fit, before those below have a say; if the rest then does not fit exactly, less than
            the budget is chosen. Without runs this changes nothing.

    Returns:
        (N,) bool, exactly ``budget`` of them true (but see ``tiers``).
    """
    limits = (budget, min_active, round_to, tiers)
    if layout.rows is layout:
        return _top_rows(scores, layout, *limits)
    row_of, row_scores = form_rows(scores, layout)
    return _top_rows(row_scores, layout, *limits).index_select(0, row_of)


def _top_rows(
    scores: Tensor,
    layout: GroupLayout,
    budget: int,
    min_active: int,
    round_to: int,
    tiers: Sequence[float],
) -> Tensor:
    """Choose whole rows, whose scores do not rise within a group; (R,) -> (R,) bool."""
    # stable and descending: equal scores stay in flat order, i.e. lower group, then lower index
    ranking, order = torch.sort(scores, descending=True, stable=True)
    groups = layout.rows.group_of.index_select(0, order)
    floors = layout.floors(min_active)
    chosen = order[:budget]
    if round_to > 1 or layout.rows is not layout or _below(floors, groups[:budget]):
        rank = _rank_within_group(groups, layout.rows)
        free = rank >= torch.tensor(floors).index_select(0, groups)
        # a tier is a stretch of the ranking
        ends = [int((ranking >= score).sum()) for score in tiers]
        counts = floors
        for others in torch.where(free, groups, -1).tensor_split(ends):
            left = budget - sum(map(mul, counts, layout.runs))
            others = others.index_select(0, (others >= 0).nonzero().flatten())
            counts = list(map(add, counts, best_rows(others, layout.runs, left)))
        if round_to > 1:
            counts = _round_rows(counts, layout, floors, round_to)
        kept = rank < torch.tensor(counts).index_select(0, groups)
        chosen = order.index_select(0, kept.nonzero().flatten())
    mask = torch.zeros(layout.rows.num_channels, dtype=torch.bool)
    mask[chosen] = True
    return mask


def _below(floors: list[int], groups: Tensor) -> bool:
    """Return whether some group appears in ``groups`` less often than its floor."""
    counts = torch.bincount(groups, minlength=len(floors)).tolist()
    return any(map(lt, counts, floors))


def _round_rows(
    counts: list[int], layout: GroupLayout, floors: list[int], round_to: int
) -> list[int]:
    widths, least = (list(map(mul, rows, layout.runs)) for rows in (counts, floors))
    rounded = round_widths(widths, layout.sizes, least, round_to, layout.runs)
    return list(map(floordiv, rounded, layout.runs))


def _rank_within_group(groups: Tensor, layout: GroupLayout) -> Tensor:
    """Return how many channels of its own group precede each entry of the ranking, (N,)."""
    by_group = torch.sort(groups, stable=True).indices
    return torch.empty_like(groups).scatter_(0, by_group, layout.rank)

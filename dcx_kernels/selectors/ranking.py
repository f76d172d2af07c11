"""One ranking over the channels of the whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import NonFiniteError, expected
from dcx_kernels.selectors.layout import GroupLayout
from dcx_kernels.selectors.rounding import round_widths

__all__ = ["channel_budget", "check_budget", "global_top", "top_mask"]


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
    scores: Mapping[str, Tensor], budget: int, min_active: int = 1, round_to: int = 1
) -> dict[str, ChannelSet]:
    """Choose the ``budget`` best channels of all groups together.

    Ties go to the lower group in the mapping's order, then to the lower index. Each group keeps at
    least its ``min_active`` best channels (all, if it has fewer); those forced in displace the
    lowest-ranked others, the budget stays. With ``round_to`` the widths that result move to
    multiples at constant budget, see `rounding.round_widths`, and each group keeps its best.

    Args:
        scores: group name -> one score a channel; floating, infinite allowed.
        budget: channels to choose, over all groups.
        min_active: least channels of a group.
        round_to: grid of the group widths; 1 for none.

    Raises:
        ValueError: if the budget is out of reach, or a score is not a 1-D floating tensor.
        NonFiniteError: if a score is NaN.

    Shape:
        scores[name]: (num_channels,) -> indices of the set: (num_active,) int64 on the CPU.
    """
    for name, score in scores.items():
        if score.dim() != 1 or not score.is_floating_point() or not score.numel():
            got = f"{score.dtype} of shape {tuple(score.shape)}"
            raise ValueError(expected("1-D floating scores", got, where=name))
    layout = GroupLayout(tuple(scores), tuple(score.numel() for score in scores.values()))
    check_budget(layout, budget, min_active, round_to)
    flat = torch.cat([score.detach().to("cpu", torch.float64) for score in scores.values()])
    wrong = flat.isnan()
    if wrong.any():
        name = layout.names[int(layout.group_of[wrong][0])]
        raise NonFiniteError(expected("scores that are numbers", "NaN", where=name))
    return layout.sets(top_mask(flat, layout, budget, min_active, round_to))


def check_budget(layout: GroupLayout, budget: int, min_active: int, round_to: int) -> None:
    """Check what every global selection presumes.

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


def top_mask(
    scores: Tensor, layout: GroupLayout, budget: int, min_active: int, round_to: int
) -> Tensor:
    """Do the work of `global_top` on flat, checked scores.

    Args:
        scores: (N,) float64 on the CPU, no NaN.
        layout: where the groups lie.
        budget: channels to choose.
        min_active: least channels of a group.
        round_to: grid of the group widths.

    Returns:
        (N,) bool, exactly ``budget`` of them true.
    """
    # stable and descending: equal scores stay in flat order, i.e. lower group, then lower index
    order = torch.sort(scores, descending=True, stable=True).indices
    groups = layout.group_of.index_select(0, order)
    num_groups = len(layout.sizes)
    floors = [min(min_active, size) for size in layout.sizes]
    widths: list[int] = torch.bincount(groups[:budget], minlength=num_groups).tolist()
    chosen = order[:budget]
    if round_to > 1 or any(w < floor for w, floor in zip(widths, floors, strict=True)):
        rank = _rank_within_group(groups, layout)
        free = rank >= torch.tensor(floors).index_select(0, groups)
        others = groups.index_select(0, free.nonzero().flatten())[: budget - sum(floors)]
        extra = torch.bincount(others, minlength=num_groups).tolist()
        widths = [floor + more for floor, more in zip(floors, extra, strict=True)]
        if round_to > 1:
            widths = round_widths(widths, layout.sizes, floors, round_to)
        kept = rank < torch.tensor(widths).index_select(0, groups)
        chosen = order.index_select(0, kept.nonzero().flatten())
    mask = torch.zeros(layout.num_channels, dtype=torch.bool)
    mask[chosen] = True
    return mask


def _rank_within_group(groups: Tensor, layout: GroupLayout) -> Tensor:
    """Return how many channels of its own group precede each entry of the ranking, (N,)."""
    by_group = torch.sort(groups, stable=True).indices
    return torch.empty_like(groups).scatter_(0, by_group, layout.rank)

"""The global top-k over the channels of all groups, on the device that the scores are on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.ops._library import register

__all__ = ["select_channels"]


def _select(
    scores: Tensor, sizes: list[int], budget: int, min_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = backend.choose(scores.device).select_channels(
        scores, sizes, budget, min_active
    )
    return found


def _select_fake(
    scores: Tensor, sizes: list[int], budget: int, min_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    indices, inverse = (scores.new_empty(scores.shape, dtype=torch.int64) for _ in range(2))
    return indices, inverse, scores.new_empty(len(sizes), dtype=torch.int64)


_select_channels = register(
    "select_channels(Tensor scores, int[] sizes, int budget, int min_active)"
    " -> (Tensor indices, Tensor inverse, Tensor counts)",
    _select,
    _select_fake,
)


def select_channels(
    scores: Tensor, sizes: Sequence[int], budget: int, min_active: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``budget`` best channels of all groups together, without waiting for the device.

    The rule is that of `dcx_kernels.selectors.global_top`: ties go to the lower group, then to the
    lower index; each group keeps at least its ``min_active`` best channels, which displace the
    lowest-ranked others. NaN, which the selectors refuse, counts as -inf here: to look for it would
    be to wait.

    Results have the shape of everything, whatever is chosen, so that a captured graph serves every
    outcome. The first call with new sizes copies them to the device; later ones copy nothing.

    Args:
        scores: one a channel, the groups end to end; infinite allowed.
        sizes: channels of each group.
        budget: channels to choose, over all groups.
        min_active: least channels of a group (all, if it has fewer).

    Returns:
        ``indices``: for each group, from its first place on, its active channels in ascending
        order, then -1. ``inverse``: the place of each channel in that list of its group, -1 if it
        is inactive. ``counts``: active channels of each group.

    Raises:
        ValueError: if scores are not 1-D floating, the sizes do not add up to them, or the budget
            is out of reach.

    Shape:
        scores: (total,) -> (total,), (total,), (groups,) int64, on the device of the scores.

    References:
        Dynamic Neural Network Channel Execution, algorithm 1: its global ranking.
    """
    if scores.dim() != 1 or not scores.is_floating_point():
        got = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(expected("1-D floating scores", got))
    sizes = list(sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(expected("sizes of at least one group, each at least 1", sizes))
    total = sum(sizes)
    if total != scores.shape[0]:
        raise ValueError(expected(f"sizes that add up to {scores.shape[0]} scores", total))
    if isinstance(min_active, bool) or not isinstance(min_active, int) or min_active < 1:
        raise ValueError(expected("min_active to be an int of at least 1", repr(min_active)))
    least = sum(min(min_active, size) for size in sizes)
    if not least <= budget <= total:
        what = (
            f"a budget of {least} (min_active={min_active} in {len(sizes)} groups) "
            f"to {total} channels"
        )
        raise ValueError(expected(what, budget))
    found: tuple[Tensor, Tensor, Tensor] = _select_channels(
        scores.detach(), sizes, budget, min_active
    )
    return found

"""Saliency of different groups on one scale, so that they can be ranked together."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["l2_normalize", "max_normalize"]


def l2_normalize(saliency: Tensor, segments: Tensor, num_groups: int) -> Tensor:
    """Divide the saliency of each group by its l2 norm; a group of zeros stays zero.

    Args:
        saliency: (A,) finite, floating; the active channels of all groups.
        segments: (A,) int64, the group of each entry.
        num_groups: number of groups.

    References:
        Dynamic Neural Network Channel Execution, eq. 3.
    """
    # the largest becomes 1 first: squares of tiny or huge saliency neither vanish nor overflow
    scaled = max_normalize(saliency, segments, num_groups)
    squares = scaled.new_zeros(num_groups).index_add_(0, segments, scaled.square())
    return scaled / _nonzero(squares.sqrt()).index_select(0, segments)


def max_normalize(saliency: Tensor, segments: Tensor, num_groups: int) -> Tensor:
    """Divide the saliency of each group by its largest magnitude; a group of zeros stays zero.

    Args:
        saliency: (A,) finite, floating; the active channels of all groups.
        segments: (A,) int64, the group of each entry.
        num_groups: number of groups.

    References:
        Learning to Prune in Training via Dynamic Channel Propagation, eq. 8.
    """
    largest = saliency.new_zeros(num_groups)
    largest.scatter_reduce_(0, segments, saliency.abs(), reduce="amax")
    return saliency / _nonzero(largest).index_select(0, segments)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))

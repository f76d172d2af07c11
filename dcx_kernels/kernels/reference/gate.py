"""The winners of each sample: which channels a per-sample gate lets through."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k_winners"]


def k_winners(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the channels of the k greatest g of each sample, ascending, and g there.

    Exactly k: ties go to the lower channel, and NaN counts as -inf (but is returned as NaN).

    Shape:
        g: (N, C) floating -> (N, k) int64, (N, k) of g's dtype.
    """
    numbers = g.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    # stable: equal values stay in the order of their channels
    best = torch.sort(numbers, dim=1, descending=True, stable=True).indices[:, :k]
    indices = best.sort(dim=1).values
    return indices, g.gather(1, indices)

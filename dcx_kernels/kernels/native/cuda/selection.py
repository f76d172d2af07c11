"""The global top-k over the channels of all groups in three launches, nothing read by the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import selection as reference
from dcx_kernels.kernels.reference.selection import group_places

__all__ = ["select_channels"]

_MOST = 2**31 - 2**11  # channels: kernels number them in int32


def select_channels(
    scores: Tensor, sizes: Sequence[int], budget: int, min_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``budget`` best channels of all groups; see `reference.selection`.

    Shape:
        scores: (total,) floating -> (total,), (total,), (groups,) int64.
    """
    if not _knows(scores, sizes):
        return reference.select_channels(scores, sizes, budget, min_active)
    if scores.dtype is not torch.float64:
        scores = scores.float()
    bounds = group_places(tuple(sizes), scores.device).bounds
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.dcx_native.select_channels(
        scores.detach().contiguous(), bounds, budget, min_active
    )
    return found


def _knows(scores: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the kernels choose, rather than the reference."""
    total = scores.shape[0]
    return _serves(scores.device) and total < _MOST and len(sizes) > 0 and sum(sizes) == total


def _serves(device: torch.device) -> bool:
    return device.type == "cuda"

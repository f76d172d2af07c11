"""Autocast: what torch does to its own convolutions, done to ours."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast"]


def autocast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast x and parameters to the autocast dtype of x's device, when autocast is on there."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point():
        return (x, *parameters)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in (x, *parameters))

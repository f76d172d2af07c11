"""In which order a tensor lies in memory, and another one that lies alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty_alike", "layout"]


def layout(x: Tensor) -> torch.memory_format:
    """Tell channels_last from contiguous by strides alone, whatever the number of channels."""
    last = x.dim() == 4 and x.stride(1) == 1 and x.shape[2] * x.shape[3] != 1
    return torch.channels_last if last else torch.contiguous_format


def empty_alike(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor with dtype, device and order of ``like``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like))

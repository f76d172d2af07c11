"""Vectors over channels: biases, statistics."""

from __future__ import annotations

from torch import Tensor

__all__ = ["per_channel", "select"]


def select(vector: Tensor | None, idx: Tensor | None) -> Tensor | None:
    """Return the active entries of a vector over channels."""
    return vector if vector is None or idx is None else vector.index_select(0, idx)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Return a view of a vector over channels that broadcasts against ``like``."""
    return vector.view(1, -1, *[1] * (like.dim() - 2))

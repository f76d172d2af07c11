"""Vectors over channels that an operator takes full or compact."""

from __future__ import annotations

from torch import Tensor

from dcx_kernels.channel_set import agree, known
from dcx_kernels.errors import expected

__all__ = ["check_vector", "compact_vector"]


def check_vector(name: str, vector: Tensor | None, size: int, compact: int | None = None) -> None:
    """Refuse a vector that is neither full, (K,), nor, where that is possible, compact, (k,)."""
    if vector is None or known(vector.shape[0] == size):
        return
    if compact is not None and agree(vector.shape[0], compact):
        return
    what = f"{size} values" if compact is None else f"{compact} (compact) or {size} (full) values"
    raise ValueError(expected(what, tuple(vector.shape), name))


def compact_vector(vector: Tensor | None, idx: Tensor | None) -> Tensor | None:
    """Return the active entries of a vector, which may be them already."""
    if vector is None or idx is None or known(vector.shape[0] == idx.shape[0]):
        return vector
    return vector.index_select(0, idx)

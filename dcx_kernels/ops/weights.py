"""Packing the active slice of a weight, and its transpose: raw operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dcx_kernels.kernels import backend
from dcx_kernels.ops._library import register
from dcx_kernels.ops.grouping import ONE_EACH

__all__ = ["pack_weight", "unpack_weight"]


def _pack(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    kernels = backend.choose(weight.device)
    active = _existing(active_groups, in_idx, groups)
    packed: Tensor = kernels.pack(weight, out_idx, in_idx, groups, active)
    return packed


def _existing(active_groups: int, in_idx: Tensor | None, groups: int) -> int:
    if active_groups != ONE_EACH:
        return active_groups
    return groups if in_idx is None else in_idx.shape[0]


def _pack_fake(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    shape = list(weight.shape)
    if out_idx is not None:
        shape[0] = out_idx.shape[0]
    if in_idx is not None and len(shape) > 1:
        shape[1] = 1 if active_groups == ONE_EACH else in_idx.shape[0] // active_groups
    return weight.new_empty(shape)


def _unpack(
    packed: Tensor,
    shape: Sequence[int],
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    kernels = backend.choose(packed.device)
    active = _existing(active_groups, in_idx, groups)
    dense: Tensor = kernels.unpack(packed, shape, out_idx, in_idx, groups, active)
    return dense


def _unpack_fake(
    packed: Tensor,
    shape: Sequence[int],
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    return packed.new_empty(list(shape))


pack_weight = register(
    "pack_weight(Tensor weight, Tensor? out_idx, Tensor? in_idx, int groups, int active_groups)"
    " -> Tensor",
    _pack,
    _pack_fake,
)
unpack_weight = register(
    "unpack_weight(Tensor packed, SymInt[] shape, Tensor? out_idx, Tensor? in_idx, int groups,"
    " int active_groups) -> Tensor",
    _unpack,
    _unpack_fake,
)

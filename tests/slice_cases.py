"""Slices of every kind a network has, with the masks that define them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from channel_helpers import Wanted, channels, slice_mask
from dcx_kernels.kernels.slices import Slice
from dcx_kernels.ops.grouping import active_groups

__all__ = ["CASES", "Case", "make", "masks", "nothing"]


class Case(NamedTuple):
    """A full shape and what is active of it; both lists None: everything."""

    shape: tuple[int, ...]
    out: Wanted
    in_: Wanted = None
    groups: int = 1
    inner: int = 1


CASES = {
    "both": Case((6, 5, 3, 3), 3, 2),
    "out": Case((7, 5, 3, 3), 3),
    "in": Case((6, 17, 1, 2), None, 5),
    "one": Case((6, 5, 1, 1), 1, 1),
    "whole": Case((3, 2, 3, 3), None),
    "vector": Case((63,), 17),
    "vector-1": Case((1,), [0]),
    "grouped": Case((9, 2, 3, 3), [0, 2, 6, 8], [1, 5], groups=3),
    "grouped-out": Case((6, 2, 3, 1), [0, 3, 5], groups=3),
    "grouped-in": Case((6, 2, 1, 3), None, [1, 2, 4], groups=3),
    "groups-gone": Case((8, 3, 1, 2), [0, 1, 4, 5], [0, 2, 7, 8], groups=4),
    "depthwise": Case((17, 1, 3, 3), [0, 3, 16], [0, 3, 16], groups=17),
    "multiplier-2": Case((8, 1, 3, 3), [0, 1, 6, 7], [0, 3], groups=4),
    "linear": Case((11, 20), 2, 7),
    "linear-inner": Case((6, 20), 2, 3, inner=4),
    "linear-inner-out": Case((6, 20), 2, None, inner=4),
    "blocks": Case((37, 20, 3, 3), 33, 17),  # more than one block of a kernel
    "whole-vector": Case((5,), None),
    "whole-blocks": Case((40, 30), None),
}


def make(device: torch.device | None = None) -> list[Slice | None]:
    """Return the slices of all cases."""
    made: list[Slice | None] = []
    for shape, out, in_, groups, inner in CASES.values():
        if out is None and in_ is None:
            made.append(None)
            continue
        out_set = channels(out, shape[0])
        in_set = channels(in_, shape[1] * groups // inner) if len(shape) > 1 else None
        lists = [None if s is None else s.indices.to(device) for s in (out_set, in_set)]
        existing = active_groups(groups, in_set, out_set)
        made.append(Slice(shape, *lists, groups, existing, inner))
    return made


def masks(slices: list[Slice | None]) -> list[Tensor]:
    """Return bool masks of the slices in their full tensors, on the CPU, from the definition."""
    result = []
    for case, slice_ in zip(CASES.values(), slices, strict=True):
        shape = case.shape
        if slice_ is None:
            result.append(torch.ones(shape, dtype=torch.bool))
            continue
        sets = [None if i is None else i.cpu() for i in (slice_.in_idx, slice_.out_idx)]
        if len(shape) == 1:
            mask = torch.zeros(shape, dtype=torch.bool)
            mask[sets[1]] = True
        else:
            sizes = shape[1] * case.groups // case.inner, shape[0]
            in_set, out_set = (
                None if i is None else channels(i, size)
                for i, size in zip(sets, sizes, strict=True)
            )
            per_channel = (shape[0], shape[1] // case.inner, case.inner, *shape[2:])
            mask = slice_mask(per_channel, in_set, out_set, case.groups).reshape(shape)
        result.append(mask)
    return result


def nothing(device: torch.device | None = None) -> list[Slice]:
    """Return slices without an entry."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return [
        Slice((5, 1, 3, 3), none, none, groups=5, active_groups=0),
        Slice((5, 4, 3, 3), None, none),
        Slice((9,), none),
    ]

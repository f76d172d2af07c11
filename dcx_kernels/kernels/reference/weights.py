"""Moving weights: the active slice of a weight is a list of rows of a 2-D view."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "gather_rows",
    "gather_vectors",
    "number_through",
    "pack",
    "row_index",
    "scatter_rows_",
    "scatter_vectors_",
    "unpack",
]


def row_index(
    shape: Sequence[int],
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int = 1,
    active_groups: int = 1,
) -> tuple[Tensor, int]:
    """List the rows of the active slice, in compact order.

    A weight ``(K, C / G, *rest)`` is viewed as rows of ``rest`` elements (of ``C / G * rest`` when
    all inputs are active), so that packing is one ``index_select`` of contiguous rows.

    Returns:
        Row numbers (1-D int64) and the length of a row in elements.
    """
    num_out, row = shape[0], math.prod(shape[1:])
    if in_idx is None or len(shape) == 1:
        assert out_idx is not None
        return out_idx, row
    per_group = shape[1]
    if out_idx is None:
        out_idx = torch.arange(num_out, device=in_idx.device)
    if in_idx.shape[0] == 0 or out_idx.shape[0] == 0:  # a slice of which no channel is active
        return in_idx[:0], row // per_group
    if groups == 1:
        rows = out_idx.unsqueeze(1) * per_group + in_idx
    else:  # [G_act, k / G_act, 1] * C/G + [G_act, 1, c / G_act]
        local = (in_idx % per_group).view(active_groups, 1, -1)
        rows = out_idx.view(active_groups, -1, 1) * per_group + local
    return rows.flatten(), row // per_group


def gather_rows(dense: Tensor, rows: Tensor, row: int, out: Tensor | None = None) -> Tensor:
    """Copy rows of ``dense`` (contiguous) into a (num_rows, row) tensor, or into ``out``."""
    source = dense.reshape(-1, row)
    if out is None:
        return source.index_select(0, rows)
    return torch.index_select(source, 0, rows, out=out.view(-1, row))


def scatter_rows_(dense: Tensor, packed: Tensor, rows: Tensor, row: int) -> None:
    """Write ``packed`` back into the rows of ``dense`` it was gathered from."""
    # index_put_ runs on all threads, index_copy_ on one
    dense.view(-1, row).index_put_((rows,), packed.reshape(-1, row))


def number_through(lists: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Join index lists into vectors of the given sizes into one, into the vectors end to end."""
    lengths = [len(part) for part in lists]
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    offsets = torch.repeat_interleave(starts, torch.tensor(lengths), output_size=sum(lengths))
    return torch.cat(list(lists)) + offsets.to(lists[0].device, non_blocking=True)


def gather_vectors(dense: Sequence[Tensor], index: Tensor) -> Tensor:
    """Copy entries of many short vectors, numbered through, into one: three calls for all."""
    return torch.cat(list(dense)).index_select(0, index)


def scatter_vectors_(dense: Sequence[Tensor], packed: Tensor, index: Tensor) -> None:
    """Write entries back into the vectors they were gathered from; the others keep their bits."""
    whole = torch.cat(list(dense)).index_copy_(0, index, packed)
    torch._foreach_copy_(list(dense), list(whole.split([len(vector) for vector in dense])))


def pack(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int = 1,
    active_groups: int = 1,
) -> Tensor:
    """Copy the active slice of ``weight`` (K, C / G, *rest) into a new (k, c / G_act, *rest)."""
    if out_idx is None and in_idx is None:
        return weight.clone(memory_format=torch.contiguous_format)
    rows, row = row_index(weight.shape, out_idx, in_idx, groups, active_groups)
    num_out = weight.shape[0] if out_idx is None else out_idx.shape[0]
    return gather_rows(weight, rows, row).view(_packed_shape(weight.shape, num_out, rows, row))


def unpack(
    packed: Tensor,
    shape: Sequence[int],
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int = 1,
    active_groups: int = 1,
) -> Tensor:
    """Return zeros of ``shape`` with ``packed`` at the active slice: the transpose of `pack`."""
    if out_idx is None and in_idx is None:
        return packed.clone(memory_format=torch.contiguous_format)
    dense = packed.new_zeros(tuple(shape))
    rows, row = row_index(shape, out_idx, in_idx, groups, active_groups)
    scatter_rows_(dense, packed, rows, row)
    return dense


def _packed_shape(shape: Sequence[int], num_out: int, rows: Tensor, row: int) -> tuple[int, ...]:
    if len(shape) == 1:
        return (num_out,)
    rest = tuple(shape[2:])
    if num_out == 0:  # a depthwise filter of no channel
        return (0, shape[1], *rest)
    return (num_out, rows.shape[0] * row // (num_out * math.prod(rest)), *rest)

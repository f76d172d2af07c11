"""Slices of many tensors in ATen: moved row by row, updated by torch's own optimizers.

An update gathers the slice of each state tensor, runs torch's kernel on packed tensors, and writes
the slices back: a chunk of layers at a time, which stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from dcx_kernels.kernels.reference.weights import (
    gather_rows,
    gather_vectors,
    number_through,
    row_index,
    scatter_rows_,
    scatter_vectors_,
)
from dcx_kernels.kernels.slices import Scratch, Slice

__all__ = [
    "SliceRows",
    "adamw_slices_",
    "gather_slices",
    "rows_of",
    "scatter_slices_",
    "sgd_slices_",
]

_CHUNK = 1 << 20  # elements


class SliceRows(NamedTuple):
    """Rows of a dense tensor, viewed as (-1, row), that make up an active slice of some shape."""

    rows: Tensor
    row: int
    shape: tuple[int, ...]

    def gather(self, dense: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy the slice out of ``dense``, into the first elements of the flat ``out`` if given."""
        if out is not None:
            out = out[: self.rows.shape[0] * self.row]
        return gather_rows(dense, self.rows, self.row, out).view(self.shape)

    def scatter_(self, dense: Tensor, packed: Tensor) -> None:
        """Write the slice back into ``dense``."""
        scatter_rows_(dense, packed, self.rows, self.row)


def rows_of(slice_: Slice) -> SliceRows:
    """Return the rows of a slice: listed once, then remembered."""
    if slice_.kept is None:
        rows, row = row_index(
            slice_.per_channel, slice_.out_idx, slice_.in_idx, slice_.groups, slice_.active_groups
        )
        slice_.kept = SliceRows(rows, row, slice_.packed_shape)
    kept: SliceRows = slice_.kept
    return kept


# --- moves ----------------------------------------------------------------------------------------


def gather_slices(
    dense: Sequence[Tensor],
    slices: Sequence[Slice | None],
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Copy the active slices of many tensors; short vectors all together, in a few calls.

    Args:
        dense: full tensors.
        slices: their slices.
        out: flat memory for a packed tensor, which takes the first elements of it.

    Returns:
        Packed tensors, none of which shares its storage with another.
    """
    packed: dict[int, Tensor] = {}
    alike: dict[object, list[int]] = {}
    for index, (tensor, slice_) in enumerate(zip(dense, slices, strict=True)):
        memory = None if out is None else out[index]
        if slice_ is None:
            flat = tensor.new_empty(tensor.numel()) if memory is None else memory[: tensor.numel()]
            packed[index] = flat.view(tensor.shape).copy_(tensor)
        elif tensor.dim() == 1 and memory is None:
            alike.setdefault((tensor.device, tensor.dtype), []).append(index)
        else:
            packed[index] = rows_of(slice_).gather(tensor, memory)
    for together in alike.values():
        vectors = [dense[index] for index in together]
        lists = _lists([slices[index] for index in together])
        numbered = number_through(lists, [len(vector) for vector in vectors])
        # copies: torch.compile guards where in a shared storage a view begins
        parts: list[Tensor] = torch.ops.aten.split_with_sizes_copy(
            gather_vectors(vectors, numbered), [len(part) for part in lists]
        )
        packed.update(zip(together, parts, strict=True))
    return [packed[index] for index in range(len(dense))]


def scatter_slices_(
    dense: Sequence[Tensor], packed: Sequence[Tensor], slices: Sequence[Slice | None]
) -> None:
    """Write packed slices back into the tensors they were gathered from."""
    for tensor, part, slice_ in zip(dense, packed, slices, strict=True):
        if slice_ is None:
            tensor.copy_(part)
        else:
            rows_of(slice_).scatter_(tensor, part)


def _lists(slices: Iterable[Slice | None]) -> list[Tensor]:
    """Return the lists of active channels of slices of vectors."""
    return [s.out_idx for s in slices if s is not None and s.out_idx is not None]


# --- updates --------------------------------------------------------------------------------------


class _Update:
    """One parameter's update: what is gathered before torch's kernel runs, written back after.

    ``packed`` and ``state`` are what the kernel changes in place: the full tensors themselves if
    the slice is everything.
    """

    __slots__ = (
        "fresh", "full", "full_state", "grad", "packed", "slice", "state", "step",
    )  # fmt: skip

    def __init__(
        self, full: Tensor, grad: Tensor, state: list[Tensor], slice_: Slice | None,
        leaf: Tensor | None, fresh: bool, step: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.full = self.packed = full
        if slice_ is not None:
            self.packed = rows_of(slice_).gather(full) if leaf is None else leaf
        self.grad = grad
        self.full_state = self.state = state
        self.slice = slice_
        self.fresh = fresh
        self.step = step

    @property
    def fusable(self) -> bool:
        """Whether torch's fused kernels may run: they go through memory, whatever the strides."""
        packed = self.packed
        dense = packed.is_contiguous() or packed.is_contiguous(memory_format=torch.channels_last)
        # and they read the step where the parameter is
        here = self.step is None or self.step.device == packed.device
        return dense and here and self.grad.layout is torch.strided

    def gather(self, scratch: Scratch) -> None:
        """Bring the state where the kernel may write."""
        if self.slice is not None:
            rows, numel = rows_of(self.slice), self.packed.numel()
            self.state = [rows.gather(full, scratch.take(numel, full)) for full in self.full_state]

    def write_back(self) -> None:
        """Put the updated slices back in place."""
        if self.slice is not None:
            rows = rows_of(self.slice)
            rows.scatter_(self.full, self.packed)
            for full, updated in zip(self.full_state, self.state, strict=True):
                rows.scatter_(full, updated)


class _Vectors:
    """Updates of norm weights and biases: hundreds of short vectors, moved in a few calls."""

    def __init__(self, updates: list[_Update]) -> None:
        self._updates = updates
        lists = _lists(update.slice for update in updates)
        self._lengths = [len(part) for part in lists]
        self._index = number_through(lists, [len(update.full) for update in updates])

    def gather(self) -> None:
        """Bring all state where the kernel may write."""
        gathered = [
            gather_vectors(full, self._index).split(self._lengths) for full in self._full_state()
        ]
        for update, *parts in zip(self._updates, *gathered, strict=True):
            update.state = parts

    def write_back(self) -> None:
        """Put all updated slices back in place."""
        self._scatter([u.full for u in self._updates], [u.packed for u in self._updates])
        for number, full in enumerate(self._full_state()):
            self._scatter(full, [u.state[number] for u in self._updates])

    def _full_state(self) -> list[list[Tensor]]:
        return [list(alike) for alike in zip(*(u.full_state for u in self._updates), strict=True)]

    def _scatter(self, full: list[Tensor], packed: list[Tensor]) -> None:
        scatter_vectors_(full, torch.cat(packed), self._index)


def sgd_slices_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor] | None,
    slices: Sequence[Slice | None],
    fresh: Sequence[bool],
    *,
    leaves: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    scratch: Scratch | None = None,
) -> None:
    """Update parameters as `torch.optim.SGD` does, at their slices, in place.

    Args:
        params: full parameters.
        grads: packed gradients; with the strides of its parameter where the slice is everything.
        buffers: full momentum buffers, with the strides of their parameters; None without momentum.
        slices: what is updated of each.
        fresh: whether a buffer has yet to be seeded: torch seeds it with the undamped gradient.
        leaves: packed parameters, where somebody has gathered them already; may be overwritten.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        scratch: memory to use again in the next step.
    """
    made = leaves or [None] * len(params)
    states = [[] for _ in params] if buffers is None else [[buffer] for buffer in buffers]
    updates = list(map(_Update, params, grads, states, slices, made, fresh))

    def update(part: list[_Update]) -> None:
        seeded = [None if u.fresh or not u.state else u.state[0] for u in part]
        sgd(
            [u.packed for u in part],
            [u.grad for u in part],
            seeded,
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,  # type: ignore[arg-type]  # torch takes a tensor too
            dampening=dampening,
            nesterov=nesterov,
            maximize=maximize,
            fused=not isinstance(lr, Tensor) and all(u.fusable and _right(u.packed) for u in part),
        )
        for u, seed in zip(part, seeded, strict=True):
            if u.fresh and u.state:
                assert seed is not None
                u.state[0].copy_(seed)

    _apply(updates, update, scratch or Scratch())


def _right(packed: Tensor) -> bool:
    """Whether torch's fused SGD is right: on CPUs it makes NaN of 16-bit momentum at times."""
    return packed.device.type != "cpu" or packed.element_size() > 2


def adamw_slices_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    steps: Sequence[Tensor],
    slices: Sequence[Slice | None],
    *,
    leaves: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    scratch: Scratch | None = None,
) -> None:
    """Update parameters as `torch.optim.AdamW` does, at their slices, in place.

    Args:
        params, grads, slices, leaves, scratch: see `sgd_slices_`.
        exp_avgs, exp_avg_sqs: full moments.
        max_exp_avg_sqs: full maxima of the second moment, with amsgrad; else None.
        steps: steps taken so far, one scalar tensor a parameter; this one is added.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
    """
    made = leaves or [None] * len(params)
    moments = [exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    states = [list(state) for state in zip(*moments, strict=True)]
    aged = [False] * len(params)
    updates = list(map(_Update, params, grads, states, slices, made, aged, steps))

    def update(part: list[_Update]) -> None:
        adamw(
            [u.packed for u in part],
            [u.grad for u in part],
            [u.state[0] for u in part],
            [u.state[1] for u in part],
            [] if max_exp_avg_sqs is None else [u.state[2] for u in part],
            [u.step for u in part if u.step is not None],
            amsgrad=max_exp_avg_sqs is not None,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=maximize,
            fused=not isinstance(lr, Tensor) and all(u.fusable for u in part),
        )

    _apply(updates, update, scratch or Scratch())


def _apply(
    updates: list[_Update], update: Callable[[list[_Update]], None], scratch: Scratch
) -> None:
    alike = _vectors_alike(updates)
    for vectors in alike:
        together = _Vectors(vectors)
        together.gather()
        update(vectors)
        together.write_back()
    done = {id(vector) for vectors in alike for vector in vectors}
    for chunk in _chunks([one for one in updates if id(one) not in done], scratch):
        for fresh in (True, False):
            part = [one for one in chunk if one.fresh is fresh]
            if part:
                update(part)
        for one in chunk:
            one.write_back()


def _vectors_alike(updates: Iterable[_Update]) -> list[list[_Update]]:
    """Return the packed updates of vectors, in lists that can be moved together."""
    found: dict[object, list[_Update]] = {}
    for one in updates:
        vector = one.full
        if one.slice is not None and vector.dim() == 1 and vector.is_contiguous():
            key = (vector.device, vector.dtype, one.fresh, len(one.full_state))
            found.setdefault(key, []).append(one)
    return list(found.values())


def _chunks(updates: Iterable[_Update], scratch: Scratch) -> Iterator[list[_Update]]:
    """Yield updates `_CHUNK` elements at a time, gathered: they stay in cache."""
    chunk: list[_Update] = []
    elements = 0
    for one in updates:
        if chunk and elements + one.packed.numel() > _CHUNK:
            yield chunk
            chunk, elements = [], 0
            scratch.release()
        one.gather(scratch)
        chunk.append(one)
        elements += one.packed.numel()
    yield chunk
    scratch.release()

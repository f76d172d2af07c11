"""Where a parameter meets its active sets: packed leaves, whose gradients are compact.

torch does not let a backward return a slice of a parameter's gradient. So the active slice is
packed into a leaf tensor of its own; backward fills that leaf's ``.grad``; the optimizer updates
the leaf and writes it back. No dense gradient exists on the way.

A leaf lives until the optimizer consumes it - until torch itself would refuse a second backward,
because the weight was modified in place. Its storage is then reused, as fresh memory costs a page
fault every 4 kB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dcx_kernels.channel_set import ChannelSet, mark_any_length
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.kernels.reference.slices import SliceRows, rows_of
from dcx_kernels.kernels.slices import Slice
from dcx_kernels.ops.grouping import active_groups

__all__ = [
    "CompactGrad",
    "PackedLeaf",
    "ParameterSlot",
    "SliceRows",
    "pack_leaves",
    "parameter_slots",
    "slots_of",
]


class CompactGrad(NamedTuple):
    """The gradient of a parameter's active slice.

    ``tensor`` is packed, (len(out_active), len(in_active), ...), unless ``mask`` is given: then it
    is dense, the sum of gradients over different sets, and ``mask``, broadcastable to it, is true
    at the active entries.
    """

    tensor: Tensor
    out_active: ChannelSet | None
    in_active: ChannelSet | None
    mask: Tensor | None = None


class PackedLeaf(NamedTuple):
    """A packed active slice: its sets, where it lies (None: it is the parameter), and of which
    state of the parameter it is.
    """

    tensor: Tensor
    out_active: ChannelSet | None
    in_active: ChannelSet | None
    slice: Slice | None
    version: tuple[int, int]
    generation: int


def _nobody() -> None:
    """Stand for a dead weak reference."""


class ParameterSlot:
    """One parameter, its active sets, and the packed leaves made since the last optimizer step.

    Args:
        parameter: full parameter, (K, C / groups, ...) or (K,); for a linear weight (K, C * inner).
        groups: groups of the convolution it belongs to.
        inner: features per input channel of a linear weight.
        packable: whether its layer can compute with packed leaves (a masked layer cannot).

    Attributes:
        compact: gradients are packed (True), set by `dcx.optim`, or dense ``.grad``s with zeros.
        owner: weak reference to the optimizer that drops its gradients.
    """

    def __init__(
        self, parameter: nn.Parameter, groups: int = 1, inner: int = 1, packable: bool = True
    ) -> None:
        self.parameter = parameter
        self.groups = groups
        self.inner = inner
        self.packable = packable
        self.compact = False
        self.owner: Callable[[], object | None] = _nobody
        self.out_active: ChannelSet | None = None
        self.in_active: ChannelSet | None = None
        self._leaves: list[PackedLeaf] = []
        self._earlier_sets: list[tuple[ChannelSet | None, ChannelSet | None]] = []
        self._generation = 0
        self._buffer: Tensor | None = None
        self._buffer_busy = False

    @property
    def _free_dims(self) -> tuple[int, ...]:
        """The dims of a packed leaf whose length depends on the sets."""
        shape = self.parameter.shape
        narrow = (self.out_active is not None, self.in_active is not None and shape[1:2] != (1,))
        return tuple(dim for dim, free in enumerate(narrow[: len(shape)]) if free)

    def set_active(self, out: ChannelSet | None, in_: ChannelSet | None = None) -> None:
        """Choose the sets of the next forward; gradients that exist keep their own."""
        if out is self.out_active and in_ is self.in_active:
            return
        if self.parameter.grad is not None and not self.compact:
            self._earlier_sets.append((self.out_active, self.in_active))
        self.out_active, self.in_active = out, in_

    # --- forward ----------------------------------------------------------------------------------

    def leaf(self) -> Tensor:
        """Return the packed leaf of the current sets, making it from the parameter if need be.

        Raises:
            ValueError: under `DistributedDataParallel`, which reduces a parameter's ``.grad`` only.
        """
        if DistributedDataParallel._get_active_ddp_module() is not None:
            # it would train on: ranks would drift apart, silently
            what = "model.grads = 'dense' before the optimizer is made, under"
            got = "compact gradients, which it does not reduce"
            raise ValueError(expected(f"{what} DistributedDataParallel", got))
        found = self._find()
        if found is not None:
            return found
        _pack([(self, self.slice())])
        return self._leaves[-1].tensor

    def _find(self) -> Tensor | None:
        """Return the leaf of the current sets, if it still holds what the parameter does."""
        version = self._version()
        for index, leaf in enumerate(self._leaves):
            same = leaf.out_active is self.out_active and leaf.in_active is self.in_active
            if same and leaf.version == version:
                if leaf.generation != self._generation:  # used again: zero_grad must keep it
                    self._leaves[index] = leaf._replace(generation=self._generation)
                return leaf.tensor
        return None

    def _keep(self, tensor: Tensor, slice_: Slice | None) -> None:
        mark_any_length(tensor, *self._free_dims)
        tensor.requires_grad_(self.parameter.requires_grad)
        sets = (self.out_active, self.in_active)
        self._leaves.append(PackedLeaf(tensor, *sets, slice_, self._version(), self._generation))

    def _version(self) -> tuple[int, int]:
        return self.parameter._version, self.parameter.data_ptr()

    def slice(
        self, out: ChannelSet | None = None, in_: ChannelSet | None = None, current: bool = True
    ) -> Slice | None:
        """Return the slice of the current (or given) sets; None if it is everything."""
        if current:
            out, in_ = self.out_active, self.in_active
        device = self.parameter.device
        out_idx = None if out is None or out.is_full else out.to(device).indices
        in_idx = None if in_ is None or in_.is_full else in_.to(device).indices
        if out_idx is None and in_idx is None:
            return None
        if self.parameter.dim() == 1:
            return Slice(self.parameter.shape, out_idx)
        groups = active_groups(self.groups, in_, out)
        return Slice(self.parameter.shape, out_idx, in_idx, self.groups, groups, self.inner)

    def rows(self) -> SliceRows | None:
        """Return the rows of the slice of the current sets; None if it is everything."""
        slice_ = self.slice()
        return None if slice_ is None else rows_of(slice_)

    def _storage(self, slice_: Slice) -> Tensor | None:
        """Return the persistent buffer, or None while a graph may still need what it holds.

        Vectors have none: they are short.
        """
        parameter, buffer = self.parameter, self._buffer
        if self._buffer_busy or parameter.dim() == 1:
            return None
        needed = slice_.numel
        if (
            buffer is None
            or buffer.numel() < needed
            or buffer.device != parameter.device
            or buffer.dtype != parameter.dtype
        ):
            buffer = self._buffer = parameter.detach().new_empty(needed)
        self._buffer_busy = True
        return buffer

    # --- backward has run -------------------------------------------------------------------------

    def gradient(self) -> CompactGrad | None:
        """Return the gradient since the last step, promoted to dense if the sets changed.

        Promoted too if the parameter has a ``.grad``, as from a penalty on the parameter itself.
        """
        with_grad = [leaf for leaf in self._leaves if leaf.tensor.grad is not None]
        if not self.compact or not with_grad:
            return self._masked_gradient()
        first, full = with_grad[0], self.parameter.grad
        if full is None and all(leaf[1:3] == first[1:3] for leaf in with_grad):
            total = first.tensor.grad
            for leaf in with_grad[1:]:
                total = total + leaf.tensor.grad  # type: ignore[operator]
            assert total is not None
            return CompactGrad(total, first.out_active, first.in_active)
        dense = torch.zeros_like(self.parameter, memory_format=torch.contiguous_format)
        if full is not None:
            dense += full
        for leaf in with_grad:
            assert leaf.tensor.grad is not None
            if leaf.slice is None:
                dense += leaf.tensor.grad
            else:
                rows, row, _ = rows_of(leaf.slice)
                dense.view(-1, row).index_add_(0, rows, leaf.tensor.grad.reshape(-1, row))
        mask = self._mask([leaf[1:3] for leaf in with_grad])
        return CompactGrad(dense, None, None, mask)

    def _masked_gradient(self) -> CompactGrad | None:
        grad = self.parameter.grad
        if grad is None:
            return None
        sets = [*self._earlier_sets, (self.out_active, self.in_active)]
        return CompactGrad(grad, None, None, self._mask(sets))

    def _mask(self, sets: list[tuple[ChannelSet | None, ChannelSet | None]]) -> Tensor | None:
        """Return a bool tensor like the parameter, true at the union of the sets; None for all."""
        if any((o is None or o.is_full) and (i is None or i.is_full) for o, i in sets):
            return None
        mask = torch.zeros(self.parameter.shape, dtype=torch.bool, device=self.parameter.device)
        for out, in_ in sets:
            slice_ = self.slice(out, in_, current=False)
            assert slice_ is not None
            rows, row, _ = rows_of(slice_)
            mask.view(-1, row)[rows] = True
        return mask

    def pending(self) -> list[Tensor]:
        """Return the packed leaves whose gradients wait for a step."""
        leaves = self._leaves if self.compact else []
        return [leaf.tensor for leaf in leaves if leaf.tensor.grad is not None]

    def consumable(self) -> PackedLeaf | None:
        """Return the one leaf an optimizer may update in place, or None (none, or promoted)."""
        with_grad = [leaf for leaf in self._leaves if leaf.tensor.grad is not None]
        if not self.compact or len(with_grad) != 1:
            return None
        leaf = with_grad[0]
        stale = leaf.version != self._version()
        return None if stale else leaf

    def scale_(self, factor: Tensor) -> None:
        """Multiply every gradient since the last step by ``factor``."""
        grads = [leaf.tensor.grad for leaf in self._leaves] if self.compact else []
        for grad in (*grads, self.parameter.grad):
            if grad is not None:
                grad.mul_(factor)

    def consume(self) -> None:
        """The optimizer has applied the gradients: drop them, the leaves, and free the storage."""
        self._earlier_sets.clear()
        self._leaves.clear()
        self._buffer_busy = False

    def zero_grad(self) -> None:
        """Drop gradients; leaves that the previous call has seen already are dropped with them."""
        self._earlier_sets.clear()
        self._generation += 1
        oldest = self._generation - 1  # forward, zero_grad, backward is a legal order
        self._leaves = [leaf for leaf in self._leaves if leaf.generation >= oldest]
        self._buffer_busy = bool(self._leaves)
        for leaf in self._leaves:
            leaf.tensor.grad = None

    # --- copies start afresh, with dense gradients -----------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterSlot:
        return _fresh(copy.deepcopy(self.parameter, memo), *self._settings())

    def __reduce__(self) -> tuple[Any, ...]:
        return _fresh, (self.parameter, *self._settings())

    def _settings(self) -> tuple[Any, ...]:
        return self.groups, self.inner, self.packable, self.out_active, self.in_active


def _fresh(
    parameter: nn.Parameter,
    groups: int,
    inner: int,
    packable: bool,
    out: ChannelSet | None,
    in_: ChannelSet | None,
) -> ParameterSlot:
    slot = ParameterSlot(parameter, groups, inner, packable)
    slot.out_active, slot.in_active = out, in_
    return slot


def pack_leaves(slots: Iterable[ParameterSlot]) -> None:
    """Make the leaves of the slots that have none yet, all together: one launch on a GPU."""
    wanting = [slot for slot in slots if slot.compact and slot._find() is None]
    _pack([(slot, slot.slice()) for slot in wanting])


@torch.no_grad()
def _pack(slices: list[tuple[ParameterSlot, Slice | None]]) -> None:
    on_device: dict[torch.device, list[tuple[ParameterSlot, Slice]]] = {}
    for slot, slice_ in slices:
        if slice_ is None:
            slot._keep(slot.parameter.detach(), None)
        else:
            on_device.setdefault(slot.parameter.device, []).append((slot, slice_))
    for device, together in on_device.items():
        packed = backend.choose(device).gather_slices(
            [slot.parameter.detach() for slot, _ in together],
            [slice_ for _, slice_ in together],
            [slot._storage(slice_) for slot, slice_ in together],
        )
        for (slot, slice_), tensor in zip(together, packed, strict=True):
            slot._keep(tensor.detach(), slice_)


def parameter_slots(module: nn.Module) -> Iterator[tuple[str, ParameterSlot]]:
    """Yield (parameter name, slot) of every module below ``module`` that has ``slots()``."""
    for name, child in module.named_modules():
        if hasattr(type(child), "slots"):
            for parameter, slot in cast(Any, child).slots().items():
                yield f"{name}.{parameter}" if name else parameter, slot


def slots_of(module: nn.Module) -> Iterator[ParameterSlot]:
    """Yield what `parameter_slots` does without the names: several times as fast."""
    for child in module.modules():
        if hasattr(type(child), "slots"):
            yield from cast(Any, child).slots().values()

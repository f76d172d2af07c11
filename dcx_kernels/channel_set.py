"""The active channels of a group: the one object that says which channels exist."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcx_kernels.errors import expected

__all__ = ["ChannelSet", "agree", "known", "mark_any_length"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class ChannelSet:
    """A frozen, validated, never empty set of active channels.

    Validation happens once, here, so that no operator ever checks an index again (on a GPU a check
    is a synchronisation). Selectors, whose indices are right by construction, use `trusted`.

    Args:
        indices: active channels in any order; a sequence of ints or a 1-D integer tensor. Stored
            sorted.
        num_channels: number of channels of the group.

    Raises:
        ValueError: on duplicate, negative, too large, empty, non-integer or non-1-D indices.

    Example:
        >>> s = ChannelSet([5, 0, 3], num_channels=8)
        >>> s.indices.tolist(), len(s), s.density
        ([0, 3, 5], 3, 0.375)
    """

    __slots__ = ("_inverse", "_may_be_empty", "_memo", "indices", "num_channels")

    indices: Tensor
    num_channels: int
    _inverse: Tensor | None
    _memo: dict[Any, Any]
    _may_be_empty: bool

    def __init__(self, indices: Sequence[int] | Tensor, num_channels: int) -> None:
        if not isinstance(num_channels, int) or isinstance(num_channels, bool) or num_channels < 1:
            raise ValueError(expected("num_channels to be a positive int", repr(num_channels)))
        tensor = _as_index_tensor(indices)
        ordered, _ = torch.sort(tensor)
        low, high = int(ordered[0]), int(ordered[-1])
        if low < 0 or high >= num_channels:
            wrong = low if low < 0 else high
            raise ValueError(expected(f"channel indices in [0, {num_channels})", wrong))
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.numel():
            raise ValueError(
                expected("unique channel indices", f"{int(repeated[0])} more than once")
            )
        self._fill(ordered, num_channels)

    @classmethod
    def trusted(cls, indices: Tensor, num_channels: int, may_be_empty: bool = False) -> ChannelSet:
        """Wrap indices known to be sorted, unique, in range, int64, not empty.

        ``may_be_empty``: they are, except for that, as in a slice of a group.
        """
        new = cls.__new__(cls)
        new._fill(indices, num_channels, may_be_empty)
        return new

    @classmethod
    def full(cls, num_channels: int) -> ChannelSet:
        """Return the set of all ``num_channels`` channels."""
        return cls.trusted(torch.arange(num_channels), num_channels)

    @classmethod
    def from_mask(cls, mask: Tensor) -> ChannelSet:
        """Return the set of channels where the 1-D bool ``mask`` is true.

        Raises:
            ValueError: if ``mask`` is not 1-D bool or selects nothing.
        """
        if mask.dtype != torch.bool or mask.dim() != 1:
            raise ValueError(expected("a 1-D bool mask", f"{mask.dim()}-D {mask.dtype}"))
        return cls(mask.nonzero().flatten(), mask.numel())

    def _fill(self, indices: Tensor, num_channels: int, may_be_empty: bool = False) -> None:
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "num_channels", num_channels)
        object.__setattr__(self, "_inverse", None)
        object.__setattr__(self, "_memo", {})
        object.__setattr__(self, "_may_be_empty", may_be_empty)
        mark_any_length(indices, 0)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a ChannelSet is frozen: cannot set {name!r}")

    def __len__(self) -> int:
        length = self.indices.shape[0]
        if torch.compiler.is_compiling() and not self._may_be_empty:
            torch._check(length >= 1)  # pooling asks
        return length

    @property
    def density(self) -> float:
        """Active fraction of the group."""
        return len(self) / self.num_channels

    @property
    def is_full(self) -> bool:
        """Whether every channel is active."""
        return known(len(self) == self.num_channels)

    @property
    def inverse(self) -> Tensor:
        """Position of each channel in `indices`, or -1; shape (num_channels,), int64."""
        if self._inverse is None:
            inverse = self.indices.new_full((self.num_channels,), -1)
            inverse[self.indices] = torch.arange(len(self), device=self.indices.device)
            object.__setattr__(self, "_inverse", inverse)
        assert self._inverse is not None
        return self._inverse

    def mask(self) -> Tensor:
        """Return the dense bool mask, shape (num_channels,)."""
        return self.inverse >= 0

    def counts_per_group(self, groups: int) -> tuple[int, ...]:
        """Count the active channels in each of ``groups`` equal runs of channels (remembered)."""
        counts: tuple[int, ...] | None = self._memo.get(groups)
        if counts is None:
            run = self.num_channels // groups
            binned = torch.bincount(self.indices.cpu() // run, minlength=groups)
            counts = self._memo[groups] = tuple(binned.tolist())
        return counts

    def to(self, device: torch.device | str) -> ChannelSet:
        """Return this set with its indices on ``device`` (copied once, then remembered)."""
        device = torch.device(device)
        if device == self.indices.device:
            return self
        moved: ChannelSet | None = self._memo.get(device)
        if moved is None:
            indices = self.indices.to(device, non_blocking=True)
            moved = ChannelSet.trusted(indices, self.num_channels, self._may_be_empty)
            self._memo[device] = moved
        return moved

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, ChannelSet):
            return NotImplemented
        same_size = self.num_channels == other.num_channels and len(self) == len(other)
        return same_size and torch.equal(self.indices, other.indices.to(self.indices.device))

    def __hash__(self) -> int:
        return hash((self.num_channels, len(self)))

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.indices[:8].tolist())) + (", ..." if len(self) > 8 else "")
        return f"ChannelSet([{shown}], {len(self)} of {self.num_channels})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ChannelSet.trusted, (self.indices, self.num_channels, self._may_be_empty)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChannelSet:
        return self  # frozen


def known(condition: bool) -> bool:
    """Return ``condition``; while torch.compile traces, whether it is certain.

    In a traced graph the length of a set is a symbol, so that the graph serves every length.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def agree(length: int, wanted: int) -> bool:
    """Return whether two lengths are equal; while torch.compile traces, whether they may be.

    The traced graph then takes them for equal, and checks that at run time, on the host.
    """
    if not torch.compiler.is_compiling():
        return length == wanted
    if known(length != wanted):
        return False
    torch._check(length == wanted)
    return True


_marks: dict[tuple[int, ...], dict[str, Any]] = {}


def mark_any_length(tensor: Tensor, *dims: int) -> None:
    """Tell torch.compile, once it is in use, not to compile anew for lengths such as 1."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds
    if dynamo is None or not dims or torch.compiler.is_compiling():
        return
    marks = _marks.get(dims)
    if marks is None:
        example = torch.empty((1,) * (max(dims) + 1))
        dynamo.decorators.mark_unbacked(example, dims)
        marks = _marks[dims] = vars(example)
    if 0 in tensor.shape:  # torch would give it the strides of lengths of 1
        shape = tensor.shape
        tensor.as_strided_(shape, [shape[dim + 1 :].numel() for dim in range(len(shape))])
    vars(tensor).update(marks)  # the call takes 20 us, and there is one for every layer and step


def _as_index_tensor(indices: Sequence[int] | Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        indices = list(indices)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
            raise ValueError(expected("integer channel indices", indices))
        indices = torch.tensor(indices, dtype=torch.int64)
    if indices.dtype not in _INTEGERS:
        raise ValueError(expected("integer channel indices", f"dtype {indices.dtype}"))
    if indices.dim() != 1:
        raise ValueError(expected("1-D channel indices", f"shape {tuple(indices.shape)}"))
    if indices.numel() == 0:
        raise ValueError(expected("at least one active channel", "an empty list"))
    return indices.detach().to(torch.int64)

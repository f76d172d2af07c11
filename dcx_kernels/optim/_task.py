"""One parameter's update: what is gathered before torch's kernel runs, and written back after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcx_kernels.ops.slot import SliceRows

__all__ = ["Scratch", "SliceTask"]


class SliceTask:
    """An update of a parameter: of all of it, of an active slice, or of the entries under a mask.

    Args:
        parameter: full parameter.
        grad: its gradient, packed if ``rows`` is going to be set, else full.
        state: its optimizer state; tensors of the parameter's shape are moved along with it.
        fresh: whether the state was created in this step.

    Attributes:
        packed: what the kernel updates in place.
        tensors: the state tensors the kernel updates in place, by name.
        rows: where the slice lies, for a packed update.
        mask: entries that may change, for a masked one.
    """

    __slots__ = ("fresh", "grad", "mask", "packed", "parameter", "rows", "state", "tensors")

    def __init__(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], fresh: bool) -> None:
        self.parameter = self.packed = parameter
        self.grad = grad
        self.state = state
        self.fresh = fresh
        self.rows: SliceRows | None = None
        self.mask: Tensor | None = None
        self.tensors: dict[str, Tensor] = {}

    @property
    def fusable(self) -> bool:
        """Whether torch's fused kernels may run: they go through memory, whatever the strides."""
        packed = self.packed
        dense = packed.is_contiguous() or packed.is_contiguous(memory_format=torch.channels_last)
        return dense and self.grad.layout is torch.strided

    def lay_out(self) -> None:
        """Give gradient and state the strides of what they belong to: loaded ones may differ."""
        for name, tensor in self.full_tensors().items():
            self.state[name] = _laid_out_as(tensor, self.parameter)
        self.grad = _laid_out_as(self.grad, self.packed)

    def gather(self, scratch: Scratch) -> None:
        """Bring the state tensors (and, under a mask, the parameter) where the kernel may write."""
        self.lay_out()
        self.tensors = self.full_tensors()
        if self.rows is not None:
            for name, tensor in self.tensors.items():
                out = scratch.take(self.packed.numel(), tensor)
                self.tensors[name] = self.rows.gather(tensor, out)
        elif self.mask is not None:
            self.packed = self.parameter.clone()
            self.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def write_back(self) -> None:
        """Put the updated slice, or the updated entries, back in place."""
        full = {"": self.parameter, **self.full_tensors()}
        for name, updated in {"": self.packed, **self.tensors}.items():
            if self.rows is not None:
                self.rows.scatter_(full[name], updated)
            elif self.mask is not None:
                full[name].copy_(torch.where(self.mask, updated, full[name]))

    def full_tensors(self) -> dict[str, Tensor]:
        """Return the state tensors of the parameter's shape, by name."""
        return {k: v for k, v in self.state.items() if k != "step" and isinstance(v, Tensor)}


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor, or a copy of it with the strides of ``like``."""
    if tensor.layout is not torch.strided or tensor.stride() == like.stride():
        return tensor
    if tensor.is_contiguous() and like.is_contiguous():  # strides of a length of 1 may differ
        return tensor
    return torch.empty_like(like).copy_(tensor)


class Scratch:
    """Persistent memory for gathered state tensors: fresh memory costs a page fault every 4 kB."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._used: dict[tuple[torch.device, torch.dtype], int] = {}

    def take(self, numel: int, like: Tensor) -> Tensor:
        """Return ``numel`` flat elements like those of ``like``, valid until `release`."""
        key = (like.device, like.dtype)
        start = self._used.get(key, 0)
        self._used[key] = start + numel
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < start + numel:
            return like.new_empty(numel)
        return buffer[start : start + numel]

    def release(self) -> None:
        """Take everything back; what did not fit this time fits the next."""
        for key, used in self._used.items():
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < used:
                self._buffers[key] = torch.empty(used, device=key[0], dtype=key[1])
        self._used.clear()

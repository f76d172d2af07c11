"""One parameter's update: what of it changes, and by which gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcx_kernels.kernels.slices import Slice

__all__ = ["SliceTask"]


class SliceTask:
    """An update of a parameter: of all of it, of an active slice, or of the entries under a mask.

    Args:
        parameter: full parameter.
        grad: its gradient, packed if ``slice`` is going to be set, else full.
        state: its optimizer state.
        fresh: whether the state was created in this step.

    Attributes:
        slice: where the active slice lies, for a packed update.
        leaf: the packed parameter, if it still holds what the parameter does.
        mask: entries that may change, for a masked one.
    """

    __slots__ = ("fresh", "grad", "leaf", "mask", "parameter", "slice", "state")

    def __init__(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], fresh: bool) -> None:
        self.parameter = parameter
        self.grad = grad
        self.state = state
        self.fresh = fresh
        self.slice: Slice | None = None
        self.leaf: Tensor | None = None
        self.mask: Tensor | None = None

    def lay_out(self) -> None:
        """Give gradient and state the strides of what they belong to: loaded ones may differ."""
        for name, tensor in self.full_tensors().items():
            self.state[name] = _laid_out_as(tensor, self.parameter)
        if self.slice is None:
            self.grad = _laid_out_as(self.grad, self.parameter)
        else:
            self.grad = self.grad.contiguous()

    def unmasked(self) -> SliceTask:
        """Return this update of all entries of a copy."""
        moved = {name: tensor.clone() for name, tensor in self.full_tensors().items()}
        return SliceTask(self.parameter.clone(), self.grad, {**self.state, **moved}, self.fresh)

    def take_masked(self, updated: SliceTask) -> None:
        """Put the entries of an updated copy in place that the mask allows to change."""
        assert self.mask is not None
        pairs = [(self.parameter, updated.parameter)]
        pairs += [(full, updated.state[name]) for name, full in self.full_tensors().items()]
        for full, new in pairs:
            full.copy_(torch.where(self.mask, new, full))

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

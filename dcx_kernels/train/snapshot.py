"""What a training step changes before its loss is known to be finite, kept so as to undo it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels.selectors import Selector
from dcx_kernels.train import rng

__all__ = ["Snapshot"]


class Snapshot:
    """Buffers (batch-norm statistics), generators and selector, as they were before a step.

    The copies of the buffers are made once and refilled in one call, so that a step pays
    microseconds for it. Weights and optimizer state need no copy: they change last.
    """

    def __init__(self, model: nn.Module, selector: Selector | None) -> None:
        self._buffers = list(model.buffers())
        self._copies = [buffer.clone() for buffer in self._buffers]
        self._selector = selector
        self._selector_state: dict[str, Any] = {}
        self._generators: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Remember the present state."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)
        self._generators = rng.capture_torch()
        if self._selector is not None:
            self._selector_state = self._selector.state_dict()

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the remembered state."""
        if self._copies:
            torch._foreach_copy_(self._buffers, self._copies)
        rng.restore_torch(self._generators)
        if self._selector is not None:
            self._selector.load_state_dict(self._selector_state)

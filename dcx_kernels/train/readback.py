"""Bring the step's loss to the host without making the GPU idle."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Readback"]


class Readback:
    """Loss and number of correct answers, copied to the host while backward runs.

    On a GPU the copy is queued right behind the forward pass, and `wait` blocks until *that* is
    done, with the backward pass already queued: the device never runs dry.

    Args:
        loss: scalar loss of the step.
        logits: shape (N, classes).
        labels: shape (N,).
    """

    def __init__(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            hits = (logits.argmax(1) == labels).sum()
            pair = torch.stack([loss.detach().double(), hits.double()])
            self._event: torch.cuda.Event | None = None
            if pair.is_cuda:
                self._pair = torch.empty(2, dtype=torch.float64, pin_memory=True)
                self._pair.copy_(pair, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
            else:
                self._pair = pair

    def wait(self) -> tuple[float, int]:
        """Return loss and correct answers; correct is 0 if the loss is not finite."""
        if self._event is not None:
            self._event.synchronize()
        loss, correct = self._pair.tolist()
        return loss, int(correct)

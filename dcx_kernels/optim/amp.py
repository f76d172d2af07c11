"""What `torch.amp.GradScaler` does not say: whether it let the optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

__all__ = ["scaled_step"]


def scaled_step(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Call ``scaler.step(optimizer)``, and return whether the optimizer stepped.

    A scaler that has found an infinite or NaN gradient skips the step, and then a selector must not
    learn from it either::

        model.zero_grad()  # drops saliency too: that of a skipped step is infinite
        scaler.scale(loss_fn(model(x), y)).backward()
        if scaled_step(scaler, optimizer):
            selector.update(model.saliency())
        scaler.update()

    Saliency is measured on the scaled loss. Selectors do not see the scale: they normalise.

    Args:
        scaler: unscales the gradients, unless ``scaler.unscale_(optimizer)`` was called before.
        optimizer: any torch optimizer.

    Returns:
        False if the gradients were not finite: weights and optimizer state are as before.

    Raises:
        AssertionError: by torch, if there is no gradient at all.
    """
    stepped = False

    def note(*_: Any) -> None:
        nonlocal stepped
        stepped = True

    # a comparison of scales before and after scaler.update() would cost a second synchronisation
    handle = optimizer.register_step_post_hook(note)
    try:
        scaler.step(optimizer)
    finally:
        handle.remove()
    return stepped

"""Accuracy and loss on a data set; nothing of the model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import Loader
from dcx_kernels.train.modes import channels

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and fraction of correct answers over ``images`` images."""

    accuracy: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    sets: Mapping[str, ChannelSet] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Evaluation:
    """Evaluate ``model`` in eval mode on every image of ``loader``.

    Args:
        model: a `ChannelModel` or any module that maps images (N, C, H, W) to logits (N, classes).
        loader: batches of images and labels.
        sets: channels to use, for a `ChannelModel`; those now active if None.
        loss_fn: mean loss of (logits, labels).
    """
    correct = total = None
    images_seen = 0
    with channels(model, sets):
        model.eval()
        for images, labels in loader.batches(0):
            logits = model(images)
            hits = (logits.argmax(1) == labels).sum()
            loss = loss_fn(logits, labels).double() * labels.shape[0]
            correct = hits if correct is None else correct + hits
            total = loss if total is None else total + loss
            images_seen += labels.shape[0]
    if correct is None or total is None:
        raise ValueError("expected at least one batch to evaluate on, got none")
    # the only synchronisation: all batches are in flight before it
    return Evaluation(int(correct) / images_seen, float(total) / images_seen, images_seen)

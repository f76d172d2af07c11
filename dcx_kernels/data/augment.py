"""Random crops and flips of a whole batch at once, on the device it lives on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.errors import expected

__all__ = ["AUGMENTATIONS", "PADDING", "augment_batch", "check_augment"]

AUGMENTATIONS = ("none", "crop", "crop-flip")
PADDING = 4


def check_augment(augment: str) -> None:
    """Raise a ValueError unless ``augment`` is one of `AUGMENTATIONS`."""
    if augment not in AUGMENTATIONS:
        raise ValueError(expected(f"augment to be one of {AUGMENTATIONS}", repr(augment)))


def augment_batch(images: Tensor, augment: str, generator: torch.Generator) -> Tensor:
    """Pad with zeros, cut a random window of the old size from each image, flip half of them.

    The draw is made on the CPU and sent along in one small copy: the same batch comes out on every
    device.

    Args:
        images: (N, C, H, W), any dtype and device.
        augment: one of `AUGMENTATIONS`; "crop" does not flip.
        generator: a CPU generator; the result depends on its state only.

    Returns:
        a new tensor like ``images`` (``images`` itself for "none").

    References:
        The shift and mirror augmentation of Deep Residual Learning for Image Recognition,
        https://arxiv.org/abs/1512.03385, section 4.2.
    """
    if augment == "none":
        return images
    n, _, h, w = images.shape
    offsets = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
    mirrored = torch.randint(2, (1, n), generator=generator)
    row, column, flip = torch.cat([offsets, mirrored]).to(images.device, non_blocking=True)
    padded = F.pad(images, (PADDING,) * 4)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # [N, C, 9, 9, H, W], a view
    cropped = windows[torch.arange(n, device=images.device), :, row, column]
    if augment == "crop":
        return cropped
    return torch.where(flip.bool()[:, None, None, None], cropped.flip(-1), cropped)

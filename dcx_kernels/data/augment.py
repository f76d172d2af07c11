"""Random crops, flips and colours of a whole batch at once, on the device it lives on."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.data.colour import shift_colours
from dcx_kernels.errors import expected

__all__ = ["AUGMENTATIONS", "PADDING", "augment_batch", "check_augment"]

AUGMENTATIONS = ("none", "crop", "crop-flip", "flip-colour", "resized-crop-flip")
PADDING = 4
_AREA = (0.25, 1.0)  # of a resized crop; the images are small already, so no 8 % of them
_ASPECT = (3 / 4, 4 / 3)


def check_augment(augment: str) -> None:
    """Raise a ValueError unless ``augment`` is one of `AUGMENTATIONS`."""
    if augment not in AUGMENTATIONS:
        raise ValueError(expected(f"augment to be one of {AUGMENTATIONS}", repr(augment)))


def augment_batch(images: Tensor, augment: str, generator: torch.Generator) -> Tensor:
    """Cut a random window from each image, or change its colours, and flip half of them.

    "crop" and "crop-flip" pad with zeros and cut a window of the old size; "resized-crop-flip" cuts
    a window of a quarter of the area or more and scales it to the old size; "flip-colour" leaves
    images in their place and changes brightness, saturation and hue. The draw is made on the CPU
    and sent along in a small copy: the same batch comes out on every device (but for how devices
    round when they scale or mix).

    Args:
        images: (N, C, H, W), any device; uint8 to be scaled or coloured, else any dtype.
        augment: one of `AUGMENTATIONS`; "crop" does not flip.
        generator: a CPU generator; the result depends on its state only.

    Returns:
        a new tensor like ``images`` (``images`` itself for "none").

    References:
        The shift and mirror augmentation of Deep Residual Learning for Image Recognition,
        https://arxiv.org/abs/1512.03385, section 4.2; the resized crops of Going Deeper with
        Convolutions, https://arxiv.org/abs/1409.4842, section 6.
    """
    if augment == "none":
        return images
    if augment == "resized-crop-flip":
        return _resized_crops(images, generator)
    if augment == "flip-colour":
        return _mirrored(shift_colours(images, generator), generator)
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


def _mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    flip = torch.randint(2, (len(images), 1, 1, 1), generator=generator)
    flip = flip.to(images.device, non_blocking=True)
    return torch.where(flip.bool(), images.flip(-1), images)


def _resized_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale a window of each image, mirrored or not, to the whole image's size."""
    n, _, h, w = images.shape
    area, shape, row, column, flip = torch.rand((5, n), generator=generator)
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * area
    low, high = (math.log(ratio) for ratio in _ASPECT)
    root = torch.exp(0.5 * (low + (high - low) * shape))  # of width / height, even on its log
    # as shares of the image, whose coordinates run from -1 to 1
    width, height = (area.sqrt() * root).clamp_(max=1), (area.sqrt() / root).clamp_(max=1)
    x, y = (2 * column - 1) * (1 - width), (2 * row - 1) * (1 - height)
    theta = torch.zeros((n, 2, 3))
    theta[:, 0, 0] = torch.where(flip < 0.5, -width, width)
    theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = x, height, y
    theta = theta.to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    # the window is never larger than the result: nothing to smooth before it is sampled
    scaled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return scaled.round_().to(images.dtype)

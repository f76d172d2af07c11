"""Random brightness, saturation and hue of a whole batch: one 3 x 3 matrix for each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["BRIGHTNESS", "HUE", "SATURATION", "shift_colours"]

# Feature Boosting and Suppression, appendix A, says "slightly": the amounts are ours
BRIGHTNESS = 32.0  # of 255, up or down
SATURATION = 0.2  # share by which the distance from grey changes
HUE = 0.05  # of a turn

# luma and two colour differences (YIQ): grey has none, a turn of their plane is one of the hue
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def shift_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change each image's brightness, saturation and hue by a random amount.

    Args:
        images: (N, C, H, W) on the scale 0 to 255, any dtype and device; with three channels they
            are red, green and blue, otherwise only the brightness changes.
        generator: a CPU generator; the result depends on its state only.

    Returns:
        a new tensor like ``images``; values are cut off at 0 and 255.

    References:
        Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", appendix A.
        https://arxiv.org/abs/1810.05331
    """
    n, channels, h, w = images.shape
    drawn = 2 * torch.rand((3, n), generator=generator, dtype=torch.float64) - 1
    light, saturation, hue = (drawn.T * torch.tensor([BRIGHTNESS, SATURATION, HUE])).T
    flat = images.flatten(2).float()
    if channels == 3:
        matrix = _colour_matrix(1 + saturation, 2 * math.pi * hue)
        flat = matrix.float().to(images.device, non_blocking=True) @ flat
    flat = flat + light.float().to(images.device, non_blocking=True)[:, None, None]
    changed: Tensor = flat.round_().clamp_(0, 255).to(images.dtype)
    return changed.view(n, channels, h, w)


def _colour_matrix(factor: Tensor, angle: Tensor) -> Tensor:
    """Return (N, 3, 3): RGB to YIQ, scale and turn the colour plane, and back."""
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    turn = torch.zeros((len(factor), 3, 3), dtype=torch.float64)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = factor * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -factor * angle.sin(), factor * angle.sin()
    matrix: Tensor = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return matrix

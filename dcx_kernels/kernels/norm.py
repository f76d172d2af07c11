"""What fused convolutions know of the norms around them.

A norm with ReLU is h = (y - center) * scale + shift, z = max(h, 0). Where y goes into a convolution
only, z is never stored: the convolution computes it from y and three vectors (`Norm`) as it loads.
Its gradient with respect to y has two parts: dh * scale, and what comes through the statistics of
the batch, an affine function of y, channel by channel (`NormGrad`); neither needs a pass of its
own over memory.

Legend: N batch, k channels. Vectors are (k,) float32, float64 in float64 networks.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Norm", "NormGrad"]


class Norm(NamedTuple):
    """h = (y - center) * scale + shift, per channel."""

    scale: Tensor
    center: Tensor
    shift: Tensor


class NormGrad(NamedTuple):
    """How a gradient behind a norm becomes that before it, dL/dy, while it is loaded.

    dL/dy = dy + (y - center) * slope + offset, if ``norm`` is None: ReLU and scale were applied by
    whoever wrote dy. Else ``dy`` is dL/dz (or dL/dh without ``relu``), and

    dL/dy = scale * (dy where h > 0, else 0) + (y - center) * slope + offset.

    Attributes:
        y: what the norm was applied to, of dy's shape.
        center, slope, offset: (k,).
    """

    y: Tensor
    center: Tensor
    slope: Tensor
    offset: Tensor
    norm: Norm | None = None
    relu: bool = False

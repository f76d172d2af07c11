"""Which pixels and taps meet in a convolution: one affine map for forward and dgrad.

Along an axis both are sums over taps t of a source pixel and a filter row,

    source pixel(i, t) = i * src_stride + base + t * tap_step,    filter row(t) = first + t * step,

for every output pixel i * out_stride + out_offset. Forward is one such `Axis`. The gradient of a
strided convolution reaches a pixel through every stride-th row of the filter only; which ones,
depends on the pixel modulo the stride. So dgrad has one `Axis` for each remainder: no tap is
computed in vain.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from dcx_kernels.kernels.window import output_pixels

__all__ = ["Axis", "dgrad_axes", "fwd_axis"]


class Axis(NamedTuple):
    """See above; ``size`` output pixels and ``taps`` filter rows."""

    size: int
    out_stride: int
    out_offset: int
    src_stride: int
    base: int
    taps: int
    tap_step: int
    first: int
    step: int


def fwd_axis(size: int, taps: int, stride: int, padding: int, dilation: int) -> Axis:
    """Return the map of a forward pass over ``size`` input pixels."""
    (outputs,) = output_pixels([size], [taps], [stride], [padding], [dilation])
    return Axis(outputs, 1, 0, stride, -padding, taps, dilation, 0, 1)


@lru_cache(maxsize=4096)
def dgrad_axes(size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[Axis, ...]:
    """Return the maps that lead to the ``size`` input pixels, but for those that no tap reaches."""
    step = stride // math.gcd(stride, dilation)
    axes = []
    for offset in range(min(stride, size)):
        reached = [r for r in range(taps) if (offset + padding - r * dilation) % stride == 0]
        if reached:
            first = reached[0]
            base = (offset + padding - first * dilation) // stride
            outputs = -(-(size - offset) // stride)
            tap_step = -(step * dilation // stride)
            axes.append(Axis(outputs, stride, offset, 1, base, len(reached), tap_step, first, step))
    return tuple(axes)

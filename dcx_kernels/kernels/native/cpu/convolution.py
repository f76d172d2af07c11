"""Weight gradients over small images as matrix products; every other convolution is oneDNN's.

The patches of an image, (R, S, c) each, are the rows of a matrix, and a weight gradient is one
product with it. In float32 (PyTorch 2.11, AVX2, 256 channels, batch 32) it takes 0.4 of oneDNN's
time at 2 x 2 pixels, 0.8 to 0.9 at 4 x 4, as much or more from 8 x 8 on. And a product has nothing
to compile, while oneDNN spends a millisecond and more on widths that it has not met. Forward gains
little (0.85 at 2 x 2), dgrad loses: they stay what they are, to the last bit.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels import reference

__all__ = ["channel_conv2d_wgrad"]

_MOST_PIXELS = 16  # P * Q
_LEAST_CHANNELS = 32  # c and k: narrower matrices are no work for a product
_CHUNK = 1 << 22  # elements of patches at a time: they stay in cache


def channel_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    """Return dw (k, c / G_act, R, S): see `reference.channel_conv2d_wgrad`."""
    k, pixels = dy.shape[1], dy.shape[2:]
    if not _wins(x, k, kernel_size, pixels, active_groups):
        return reference.channel_conv2d_wgrad(
            dy, x, kernel_size, stride, padding, dilation, active_groups
        )
    rows = dy.permute(0, 2, 3, 1).reshape(-1, k).t()
    dw = x.new_zeros((k, math.prod(kernel_size) * x.shape[1]))
    for start, patches in _patches(x, kernel_size, stride, padding, dilation, pixels):
        dw.addmm_(rows[:, start : start + patches.shape[0]], patches)
    return dw.view(k, *kernel_size, x.shape[1]).permute(0, 3, 1, 2).contiguous()


def _wins(x: Tensor, other: int, kernel: Sequence[int], pixels: Sequence[int], groups: int) -> bool:
    """Whether a product is the faster way, for x (N, c, ...) and ``other`` channels."""
    wide = min(x.shape[1], other) >= _LEAST_CHANNELS and x.shape[0] > 0
    small = 0 < math.prod(pixels) <= _MOST_PIXELS and 1 < math.prod(kernel) <= 9
    return wide and small and groups == 1 and x.dtype is torch.float32


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pixels: Sequence[int],
) -> Iterator[tuple[int, Tensor]]:
    """Yield the patches of x, (rows, R * S * c), some samples at a time, and their first row."""
    (R, S), (P, Q), (pad_h, pad_w) = kernel, pixels, padding
    n, c, H, W = x.shape
    around = x.new_zeros((n, H + 2 * pad_h, W + 2 * pad_w, c))
    around[:, pad_h : pad_h + H, pad_w : pad_w + W] = x.permute(0, 2, 3, 1)
    sn, sh, sw, sc = around.stride()
    strides = (sn, sh * stride[0], sw * stride[1], sh * dilation[0], sw * dilation[1], sc)
    at_once = max(1, _CHUNK // (P * Q * R * S * c))
    for first in range(0, n, at_once):
        some = around[first : first + at_once]
        shape = (some.shape[0], P, Q, R, S, c)
        view = some.as_strided(shape, strides, some.storage_offset())
        yield first * P * Q, view.reshape(some.shape[0] * P * Q, R * S * c)

"""What comes out of a window that slides over an image."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["output_pixels"]


def output_pixels(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return P and Q of an image of ``size`` H and W."""
    axes = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (r - 1) - 1) // s + 1 for n, r, s, p, d in axes]

"""Which implementation convolves on a GPU: our kernel, or cuDNN on packed weights.

``own`` reads weights through index lists and takes any width as it is. ``library`` packs the active
slice of the weight, a few hundred kilobytes, and leaves the rest to cuDNN. ``padded`` is that with
channel counts rounded up to 16 bytes, filled with zeros: a copy of the activations for faster
products.
"""

from __future__ import annotations

from typing import Literal

import torch

from dcx_kernels._env import convolution_override
from dcx_kernels.errors import expected

__all__ = ["IMPLEMENTATIONS", "SOURCE", "Implementation", "implementation"]

Implementation = Literal["own", "library", "padded"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("own", "library", "padded")

SOURCE = "not measured on a GPU yet: cuDNN for widths of whole 16-byte vectors, our kernel for odd"

_Pass = Literal["fwd", "dgrad", "wgrad"]
_Width = Literal["aligned", "odd", "narrow groups"]
_TABLE: dict[_Width, dict[_Pass, Implementation]] = {
    "aligned": {"fwd": "library", "dgrad": "library", "wgrad": "library"},
    "odd": {"fwd": "own", "dgrad": "own", "wgrad": "own"},
    # a product of matrices wastes most of a tile on a depthwise filter
    "narrow groups": {"fwd": "library", "dgrad": "library", "wgrad": "library"},
}
_NARROW = 16  # channels; what a tensor core multiplies at least


def implementation(
    which: _Pass, dtype: torch.dtype, num_in: int, num_out: int, groups: int
) -> Implementation:
    """Return what convolves ``num_in`` (c) channels into ``num_out`` (k), in existing ``groups``.

    Raises:
        ValueError: if ``DCX_CONV`` names no implementation.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "library"
    forced = convolution_override()
    if forced is not None:
        for known in IMPLEMENTATIONS:
            if forced == known:
                return known
        raise ValueError(expected(f"DCX_CONV to be one of {IMPLEMENTATIONS}", repr(forced)))
    if groups > 1 and min(num_in, num_out) < _NARROW * groups:
        return _TABLE["narrow groups"][which]
    vector = 16 // dtype.itemsize
    aligned = num_in // groups % vector == 0 and num_out // groups % vector == 0
    return _TABLE["aligned" if aligned else "odd"][which]

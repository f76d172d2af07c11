"""What convolution kernels do to operands while they load them; see `dcx_kernels.kernels.norm`."""

import triton
import triton.language as tl

__all__ = ["activate", "gradient_before", "gradient_behind"]


@triton.jit
def activate(y, scale, center, shift):
    """Return relu((y - center) * scale + shift), fp32."""
    h = (y.to(tl.float32) - center) * scale + shift
    return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch


@triton.jit
def gradient_before(dy, y, center, slope, offset):
    """Return dL/dy of a norm whose ReLU and scale are in ``dy`` already, fp32."""
    return dy.to(tl.float32) + (y.to(tl.float32) - center) * slope + offset


@triton.jit
def gradient_behind(dz, y, scale, shift, center, slope, offset, RELU: tl.constexpr):
    """Return dL/dy from dL/dz (dL/dh without ReLU), fp32."""
    dh, centered = dz.to(tl.float32), y.to(tl.float32) - center
    if RELU:
        dh = tl.where(centered * scale + shift > 0, dh, 0.0)
    return dh * scale + centered * slope + offset

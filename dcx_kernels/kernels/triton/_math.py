"""Arithmetic that kernels share; Triton's interpreter needs some of it written out."""

import triton
import triton.language as tl

from dcx_kernels.kernels.triton._launch import INTERPRETED

__all__ = ["add", "cast", "dot"]

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc (fp32) + a @ b; ``PRECISION`` of fp32 operands: "tf32" or "ieee"."""
    if _INTERPRETED:  # it takes the bits of bfloat16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round fp32 x to ``dtype``, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # it cuts bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def add(x, AXIS: tl.constexpr, KEEP: tl.constexpr = False):
    """Sum along an axis, fp32."""
    if _INTERPRETED:  # it adds one after the other, a GPU in a tree
        return tl.sum(x.to(tl.float64), AXIS, keep_dims=KEEP).to(tl.float32)
    else:
        return tl.sum(x, AXIS, keep_dims=KEEP)

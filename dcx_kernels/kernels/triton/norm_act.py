"""Passes over y that norms with ReLU need where no convolution takes them over.

h = (y - center) * scale + shift, z = max(h, 0); see `dcx_kernels.kernels.norm`. Elementwise passes
see tensors as matrices: rows of samples or pixels, columns of all else, whose channels repeat.

Legend: N batch, k channels, S sets of tiles (samples), T tiles of rows (n, pixel).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton._launch import cdiv, kernel, on
from dcx_kernels.kernels.triton._math import add, cast
from dcx_kernels.kernels.triton._operands import gradient_before, gradient_behind
from dcx_kernels.kernels.triton._walk import element_offsets, fold, plan, walk
from dcx_kernels.kernels.triton.moments import sum_partials

__all__ = [
    "launch_norm_act",
    "launch_norm_grad",
    "matrix_tile",
    "norm_act_bwd",
    "norm_act_fwd",
    "norm_grad",
    "norm_partials",
]


class _Matrix(NamedTuple):
    grid: tuple[int]
    extents: tuple[int, ...]  # rows, cols, channels, pixels: channel = col / pixels mod channels
    strides: tuple[int, ...]
    flags: dict[str, Any]


def _matrix(first: Tensor, *others: Tensor) -> tuple[tuple[Tensor, ...], _Matrix]:
    """Return the tensors, and then one like the first to write into, as matrices."""
    tensors, strides, planar, batch, channels, pixels = walk(first, *others)
    out = torch.empty_like(tensors[0])
    rows, cols = (batch, channels * pixels) if planar else (batch * pixels, channels)
    strides = (*strides, cols)
    times = fold(rows, cols, strides)
    rows, cols = rows // times, cols * times
    strides = tuple(stride * times for stride in strides)
    block_r, block_c = (64, 64) if rows >= 32 else (4, 1024)
    flags = {
        "ALIGNED": all(stride % 8 == 0 for stride in (*strides, cols)),
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
    }
    extents = (rows, cols, channels, pixels if planar else 1)
    grid = (cdiv(rows, block_r) * cdiv(cols, block_c),)
    return (*tensors, out), _Matrix(grid, extents, strides, flags)


@triton.jit
def matrix_tile(rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return rows (BLOCK_R, 1), int64, columns (BLOCK_C,) of this program, and which exist."""
    blocks = tl.cdiv(cols, BLOCK_C)
    r = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return r.to(tl.int64)[:, None], c, (r < rows)[:, None] & (c < cols)[None, :]


# --- elementwise ----------------------------------------------------------------------------------


@kernel("y_ptr", "z_ptr")
def _norm_act_fwd_kernel(
    y_ptr, z_ptr, scale_ptr, center_ptr, shift_ptr, weight_ptr,
    rows, cols, channels, pixels, y_stride, z_stride,
    RELU: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        cols, y_stride, z_stride = (cols // 8) * 8, (y_stride // 8) * 8, (z_stride // 8) * 8
    r, c, inside = matrix_tile(rows, cols, BLOCK_R, BLOCK_C)
    y = tl.load(y_ptr + r * y_stride + c[None, :], inside, other=0.0)
    channel = (c // pixels) % channels
    scale = tl.load(scale_ptr + channel)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel).to(tl.float32)
    center = tl.load(center_ptr + channel)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel).to(tl.float32)
    z = (y.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = z_ptr + r * z_stride + c[None, :]
    tl.store(at, cast(z, z_ptr.dtype.element_ty), inside)


def launch_norm_act(
    y: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    relu: bool,
) -> Tensor:
    """Like `norm_act_fwd`, of the scale ``scale * weight``; weight and shift of any dtype."""
    if y.numel() == 0:
        return torch.empty_like(y)
    (source, z), matrix = _matrix(y)
    with on(y):
        _norm_act_fwd_kernel[matrix.grid](
            source, z, scale, center, shift, weight, *matrix.extents, *matrix.strides,
            RELU=relu, **matrix.flags,
        )  # fmt: skip
    return z


def norm_act_fwd(y: Tensor, norm: Norm, relu: bool) -> Tensor:
    """Return (y - center) * scale + shift, and its ReLU if ``relu``.

    Shape:
        (N, k, ...), fp16, bf16 or fp32, and vectors (k,) float32 -> as y, dtype and layout too.
    """
    return launch_norm_act(y, norm.scale, norm.center, norm.shift, None, relu)


@kernel("dy_ptr", "y_ptr", "dx_ptr")
def _norm_grad_kernel(
    dy_ptr, y_ptr, dx_ptr, scale_ptr, center_ptr, shift_ptr, slope_ptr, offset_ptr,
    rows, cols, channels, pixels, dy_stride, y_stride, dx_stride,
    RELU: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        cols, dx_stride = (cols // 8) * 8, (dx_stride // 8) * 8
        dy_stride, y_stride = (dy_stride // 8) * 8, (y_stride // 8) * 8
    r, c, inside = matrix_tile(rows, cols, BLOCK_R, BLOCK_C)
    dy = tl.load(dy_ptr + r * dy_stride + c[None, :], inside, other=0.0)
    channel = (c // pixels) % channels
    center = tl.load(center_ptr + channel)[None, :]
    shift = tl.zeros((1, BLOCK_C), tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel).to(tl.float32)[None, :]
    at_y = y_ptr + r * y_stride + c[None, :]
    if slope_ptr is None:  # statistics that are constants; y, then, counts for its sign only
        scale = tl.load(scale_ptr + channel)[None, :]
        dx = dy.to(tl.float32)
        if RELU:
            h = (tl.load(at_y, inside, other=0.0).to(tl.float32) - center) * scale + shift
            dx = tl.where(h > 0, dx, 0.0)
        dx *= scale
    else:
        y = tl.load(at_y, inside, other=0.0)
        slope = tl.load(slope_ptr + channel)[None, :]
        offset = tl.load(offset_ptr + channel)[None, :]
        if scale_ptr is None:
            dx = gradient_before(dy, y, center, slope, offset)
        else:
            scale = tl.load(scale_ptr + channel)[None, :]
            dx = gradient_behind(dy, y, scale, shift, center, slope, offset, RELU)
    at = dx_ptr + r * dx_stride + c[None, :]
    tl.store(at, cast(dx, dx_ptr.dtype.element_ty), inside)


def launch_norm_grad(
    dy: Tensor,
    y: Tensor,
    scale: Tensor | None,
    center: Tensor,
    shift: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    relu: bool,
) -> Tensor:
    """Like `norm_grad`; without slope and offset statistics were constants (``scale`` is given)."""
    if dy.numel() == 0:
        return torch.empty_like(dy)
    (dy, y, dx), matrix = _matrix(dy, y)
    with on(dy):
        _norm_grad_kernel[matrix.grid](
            dy, y, dx, scale, center, shift, slope, offset, *matrix.extents, *matrix.strides,
            RELU=relu, **matrix.flags,
        )  # fmt: skip
    return dx


def norm_grad(dy: Tensor, grad: NormGrad) -> Tensor:
    """Return the gradient before a norm that ``grad`` describes, in one pass.

    The center of ``grad`` is that of its norm.

    Shape:
        (N, k, ...), fp16, bf16 or fp32, and vectors (k,) float32 -> as dy, dtype and layout too.
    """
    scale, shift = (grad.norm.scale, grad.norm.shift) if grad.norm else (None, None)
    return launch_norm_grad(
        dy, grad.y, scale, grad.center, shift, grad.slope, grad.offset, grad.relu
    )


# --- sums -----------------------------------------------------------------------------------------


@kernel("dz_ptr", "y_ptr")
def _norm_act_bwd_kernel(
    dz_ptr, y_ptr, partial_ptr, scale_ptr, center_ptr, shift_ptr, weight_ptr,
    span, block, tiles, cols, channels, pixels, dz_stride, y_stride,
    RELU: tl.constexpr, PLANAR: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        dz_stride, y_stride = (dz_stride // 8) * 8, (y_stride // 8) * 8
        if PLANAR:
            pixels, span, block = (pixels // 8) * 8, (span // 8) * 8, (block // 8) * 8
        else:
            cols = (cols // 8) * 8
    AXIS: tl.constexpr = 1 if PLANAR else 0
    blocks = tl.cdiv(cols, BLOCK_C)
    tile = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = (tile // tiles) * span
    first = here + (tile % tiles) * block
    end = tl.minimum(first + block, here + span)
    row = first + tl.arange(0, BLOCK_R)
    if PLANAR:
        r, c = row[None, :], col[:, None]
        if ALIGNED:
            end = (end // 8) * 8
    else:
        r, c = row[:, None], col[None, :]
    channel = c % channels
    center = tl.load(center_ptr + channel)
    scale = tl.zeros_like(center)
    shift = tl.zeros_like(center)
    if RELU:
        scale = tl.load(scale_ptr + channel)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel).to(tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + channel).to(tl.float32)
    by_y = tl.zeros((BLOCK_C, BLOCK_R) if PLANAR else (BLOCK_R, BLOCK_C), tl.float32)
    total = by_y
    for i in range(0, end - first, BLOCK_R):
        inside = (r + i < end) & (c < cols)
        at_dz = dz_ptr + element_offsets(r + i, c, dz_stride, pixels, PLANAR)
        at_y = y_ptr + element_offsets(r + i, c, y_stride, pixels, PLANAR)
        dh = tl.load(at_dz, inside, other=0.0).to(tl.float32)
        centered = tl.load(at_y, inside, other=0.0).to(tl.float32) - center
        if RELU:
            dh = tl.where(centered * scale + shift > 0, dh, 0.0)
        by_y += dh * centered
        total += dh
    at = partial_ptr + (tile.to(tl.int64) * (cols // channels) + c // channels) * 2 * channels
    at += channel
    tl.store(at, add(by_y, AXIS, True), c < cols)
    tl.store(at + channels, add(total, AXIS, True), c < cols)


def norm_partials(
    dz: Tensor,
    y: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    relu: bool,
    per_sample: bool,
) -> Tensor:
    """Begin the sums of `norm_act_bwd`, of the scale ``scale * weight``; not of empty tensors.

    Returns:
        partial (S, T, 2, k) float32, S = N if ``per_sample`` else 1: sums of dh * (y - center), and
        of dh.
    """
    (y, dz), strides, planar, batch, channels, pixels = walk(y, dz)
    sets, span = (batch, pixels) if per_sample else (1, batch * pixels)
    cut = plan(sets, span, channels, pixels, strides, planar, False)
    shape = (sets, cut.tiles * cut.times, 2, channels)
    partial = torch.empty(shape, dtype=torch.float32, device=y.device)
    grid = (sets * cut.tiles * cdiv(cut.cols, cut.block_cols),)
    with on(y):
        _norm_act_bwd_kernel[grid](
            dz, y, partial, scale, center, shift, weight,
            cut.span, cut.block, cut.tiles, cut.cols, channels, pixels,
            strides[1] * cut.times, strides[0] * cut.times,
            RELU=relu, PLANAR=planar, ALIGNED=cut.aligned,
            BLOCK_R=cut.block_rows, BLOCK_C=cut.block_cols,
        )  # fmt: skip
    return partial


def norm_act_bwd(
    dz: Tensor, y: Tensor, norm: Norm, relu: bool, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """Sum the gradients of a norm's vectors over batch and pixels, in one pass.

    With dh = dz where h > 0, else 0 (dz itself without ``relu``): sums of dh * (y - center), and
    of dh.

    Args:
        dz, y: (N, k, ...), fp16, bf16 or fp32.
        per_sample: sum over pixels only.

    Returns:
        dscale and dshift, (k,) float32, or (N, k) if ``per_sample``.
    """
    if y.numel() == 0:
        shape = y.shape[:2] if per_sample else y.shape[1:2]
        dscale = torch.zeros(shape, dtype=torch.float32, device=y.device)
        return dscale, torch.zeros_like(dscale)
    partial = norm_partials(dz, y, norm.scale, norm.center, norm.shift, None, relu, per_sample)
    sums = sum_partials(partial)
    sums = sums if per_sample else sums[0]
    return sums.select(-2, 0), sums.select(-2, 1)

"""Gradients of convolution weights: an implicit matrix product over all pixels of the output.

Rows are out channels, columns the in channels of one tap of the filter. Pixels are split, such that
few channels fill a GPU as well; every split writes a partial sum in fp32, and a second kernel
adds them in order: the result is deterministic. Where every sample has channels of its own, a split
lies within one sample.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. Inside, ``k`` and ``c`` are counts within a group, a tap is r * S + s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels import reference, tiles
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.triton._launch import aligned, cdiv, kernel, on
from dcx_kernels.kernels.triton._math import cast, dot
from dcx_kernels.kernels.triton._operands import activate, gradient_before, gradient_behind
from dcx_kernels.kernels.triton._wgrad_sums import positions, sum_partials

__all__ = ["channel_conv2d_wgrad", "sample_conv2d_wgrad"]

_PARTIAL_BYTES = 64 << 20


@triton.jit
def _column(ptr, channel, there):
    """Load a vector over channels as a column."""
    return tl.load(ptr + channel, mask=there, other=0.0)[:, None]


@kernel("dy_ptr", "x_ptr", "y_ptr")
def _conv_wgrad_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,  # of the norm behind this convolution
    out_ptr,  # dw, or partials (splits, G * k, c, R, S)
    x_scale_ptr, x_center_ptr, x_shift_ptr,
    y_center_ptr, y_slope_ptr, y_offset_ptr, y_scale_ptr, y_shift_ptr,
    dy_n, dy_p, dy_q,  # strides; channels lie side by side
    x_n, x_h, x_w,
    y_n, y_p, y_q,
    H, W, P, Q, R, S,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    G, k, c,
    multiplier,  # out channels of one in channel, if depthwise
    segment,  # pixels that are summed: those of all samples, or of one
    parts, length,  # splits of a segment; pixels of a split
    first,  # the segment of split 0
    RELU: tl.constexpr,
    DEPTHWISE: tl.constexpr,  # 1: an in channel has one filter, 2: several
    DY_VECTOR: tl.constexpr,  # k and the strides of dy and y are multiples of it
    X_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    # splits come last: what runs at a time shares its pixels in the cache
    pid, taps = tl.program_id(0), R * S
    tap, pid = pid % taps, pid // taps
    tiles_c, tiles_k = tl.cdiv(c, BLOCK_C), tl.cdiv(k, BLOCK_K)
    tile_c, pid = pid % tiles_c, pid // tiles_c
    tile_k, pid = pid % tiles_k, pid // tiles_k
    group, split = pid % G, pid // G
    start = (first + split // parts) * segment
    end = tl.minimum(start + (split % parts + 1) * length, start + segment)
    start += split % parts * length

    # a product shows the compiler what a number is a multiple of: loads of 16 bytes
    k = k // DY_VECTOR * DY_VECTOR
    if DEPTHWISE == 0:
        c = c // X_VECTOR * X_VECTOR
    dy_n, dy_p, dy_q = dy_n // DY_VECTOR, dy_p // DY_VECTOR, dy_q // DY_VECTOR
    y_n, y_p, y_q = y_n // DY_VECTOR, y_p // DY_VECTOR, y_q // DY_VECTOR
    x_n, x_h, x_w = x_n // X_VECTOR, x_h // X_VECTOR, x_w // X_VECTOR

    row = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row_there, out_channel = row < k, group * k + row
    if DEPTHWISE == 0:
        column = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
        column_there, in_channel = column < c, group * c + column
        acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    else:
        column_there = row_there
        in_channel = out_channel if DEPTHWISE == 1 else out_channel // multiplier
        acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    if x_scale_ptr is not None:
        x_scale = _column(x_scale_ptr, in_channel, column_there)
        x_center = _column(x_center_ptr, in_channel, column_there)
        x_shift = _column(x_shift_ptr, in_channel, column_there)
    if y_ptr is not None:
        y_center = _column(y_center_ptr, out_channel, row_there)
        y_slope = _column(y_slope_ptr, out_channel, row_there)
        y_offset = _column(y_offset_ptr, out_channel, row_there)
    if y_scale_ptr is not None:
        y_scale = _column(y_scale_ptr, out_channel, row_there)
        y_shift = _column(y_shift_ptr, out_channel, row_there)
    from_h = tap // S * dilation_h - pad_h
    from_w = tap % S * dilation_w - pad_w

    for base in range(start, end, BLOCK_P):
        pixel = base + tl.arange(0, BLOCK_P)
        pixel_there = pixel < end
        n, p, q = (pixel // (P * Q)).to(tl.int64), pixel // Q % P, pixel % Q

        there = row_there[:, None] & pixel_there[None, :]
        at = (n * dy_n + p * dy_p + q * dy_q) * DY_VECTOR
        dy = tl.load(dy_ptr + at[None, :] + out_channel[:, None], mask=there, other=0.0)
        if y_ptr is not None:
            at = (n * y_n + p * y_p + q * y_q) * DY_VECTOR
            y = tl.load(y_ptr + at[None, :] + out_channel[:, None], mask=there, other=0.0)
            if y_scale_ptr is not None:
                dy = gradient_behind(dy, y, y_scale, y_shift, y_center, y_slope, y_offset, RELU)
            else:
                dy = gradient_before(dy, y, y_center, y_slope, y_offset)
            dy = cast(tl.where(there, dy, 0.0), dy_ptr.dtype.element_ty)

        h, w = p * stride_h + from_h, q * stride_w + from_w
        inside = pixel_there & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        there = column_there[:, None] & inside[None, :]
        at = (n * x_n + h * x_h + w * x_w) * X_VECTOR
        x = tl.load(x_ptr + at[None, :] + in_channel[:, None], mask=there, other=0.0)
        if x_scale_ptr is not None:
            # padding comes behind the activation: it is zero
            x = tl.where(there, activate(x, x_scale, x_center, x_shift), 0.0)
            x = cast(x, x_ptr.dtype.element_ty)

        if DEPTHWISE == 0:
            acc = dot(dy, tl.trans(x), acc, PRECISION)
        else:
            acc += dy.to(tl.float32) * x.to(tl.float32)

    row_ptr = out_ptr + (split.to(tl.int64) * G * k + out_channel) * c * taps + tap
    if DEPTHWISE == 0:
        at = row_ptr[:, None] + column[None, :] * taps
        there = row_there[:, None] & column_there[None, :]
        tl.store(at, cast(acc, out_ptr.dtype.element_ty), mask=there)
    else:
        dw = tl.sum(acc, axis=1)
        tl.store(row_ptr, cast(dw, out_ptr.dtype.element_ty), mask=row_there)


class _Product(NamedTuple):
    """What is multiplied; ``k`` and ``c`` are counts within a group."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int  # 1 if depthwise: all channels are rows
    k: int
    c: int
    multiplier: int  # out channels of one in channel, if depthwise
    depthwise: int
    tile: tiles.Tile

    @property
    def programs(self) -> int:
        """Count the programs of a split."""
        tiles = cdiv(self.k, self.tile.out) * cdiv(self.c, self.tile.inner)
        return tiles * self.groups * math.prod(self.kernel_size)

    @property
    def entries(self) -> int:
        """Count the entries of a partial."""
        return self.groups * self.k * self.c * math.prod(self.kernel_size)


class _Cut(NamedTuple):
    """How pixels are split: every segment of them into parts of a length."""

    segment: int
    parts: int
    length: int


def _product(
    dy: Tensor, x: Tensor, groups: int, *pairs: Sequence[int], fused: bool = False
) -> _Product:
    k, c, multiplier, depthwise = dy.shape[1] // groups, x.shape[1] // groups, 1, 0
    if c == 1:
        multiplier, depthwise = k, 1 if k == 1 else 2
        k, groups = k * groups, 1
    kernel_size, stride, padding, dilation = ((pair[0], pair[1]) for pair in pairs)
    rows, itemsize = dy.numel() // dy.shape[1], x.element_size()
    if depthwise:  # a product element by element
        tile = tiles.Tile(32, 64, 16, 4, 2)
    else:
        scalar = 1 in (_vector_size(k, dy), _vector_size(c, x))
        chosen = tiles.wgrad_tile(rows, k, c, itemsize)
        tile = tiles.fitted("wgrad", chosen, itemsize, scalar=scalar, pairs=fused)
    geometry = (kernel_size, stride, padding, dilation)
    return _Product(*geometry, groups, k, c, multiplier, depthwise, tile)


def _cut(product: _Product, segments: int, segment: int, parts: int | None) -> _Cut:
    """Split segments of so many pixels, into so many parts each if that is given."""
    block_p = product.tile.rows
    if parts is None:
        splits = tiles.wgrad_splits(segment, product.programs * segments, product.tile)
        parts = max(1, min(splits, _PARTIAL_BYTES // (4 * product.entries)))
    length = cdiv(cdiv(segment, parts), block_p) * block_p
    return _Cut(segment, cdiv(segment, length), length)


def _multiply(
    product: _Product,
    cut: _Cut,
    segments: tuple[int, int],
    dy: Tensor,
    x: Tensor,
    out: Tensor,
    x_norm: Norm | None = None,
    dy_grad: NormGrad | None = None,
) -> None:
    """Write the sums of all parts of the segments [first, last) into ``out``."""
    first, last = segments
    y = None if dy_grad is None else _channels_inside(dy_grad.y)
    grad: list[Tensor | None] = [None] * 5
    if dy_grad is not None:
        behind = (None, None) if dy_grad.norm is None else (dy_grad.norm.scale, dy_grad.norm.shift)
        grad = [dy_grad.center, dy_grad.slope, dy_grad.offset, *behind]
    strided = (dy, x, dy if y is None else y)
    strides = [tensor.stride(dim) for tensor in strided for dim in (0, 2, 3)]
    tile = product.tile
    _conv_wgrad_kernel[(product.programs * cut.parts * (last - first),)](
        dy, x, y, out,
        *([None] * 3 if x_norm is None else x_norm),
        *grad,
        *strides,
        *x.shape[2:], *dy.shape[2:], *product.kernel_size,
        *product.stride, *product.padding, *product.dilation,
        product.groups, product.k, product.c, product.multiplier,
        *cut, first,
        RELU=dy_grad is not None and dy_grad.relu,
        DEPTHWISE=product.depthwise,
        DY_VECTOR=_vector_size(product.k, *([dy] if y is None else [dy, y])),
        X_VECTOR=_vector_size(product.k if product.depthwise == 1 else product.c, x),
        PRECISION="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        BLOCK_K=tile.out, BLOCK_C=tile.inner, BLOCK_P=tile.rows,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _channels_inside(x: Tensor) -> Tensor:
    """Return x with channels side by side: a copy, if they are not."""
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    return aligned(x)


def _vector_size(channels: int, *tensors: Tensor) -> int:
    """Return the entries of a load that stays in a group's channels of a pixel: 16 or 4 bytes."""
    numbers = [channels]
    for x in tensors:
        numbers += [x.stride(dim) for dim in (0, 2, 3) if x.shape[dim] > 1]
    itemsize = tensors[0].element_size()
    sizes = [size for size in (16 // itemsize, 4 // itemsize) if math.gcd(*numbers) % size == 0]
    return max(sizes, default=1)


def channel_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
    *,
    x_norm: Norm | None = None,
    dy_grad: NormGrad | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return dw (k, c / G_act, R, S) of the active slice, contiguous, in the dtype of x.

    Args:
        dy: (N, k, P, Q), of any strides; fastest if channels lie side by side, as those of ``x``.
        x: (N, c, H, W), compact.
        kernel_size: R and S.
        stride, padding, dilation: two each.
        active_groups: groups of which channels are active.
        x_norm: makes the operand relu((x - center) * scale + shift), with zeros around it.
        dy_grad: what is added to ``dy`` first; the center of its norm is its own.
        splits: parts that the pixels are summed in; None chooses.
    """
    shape = (dy.shape[1], x.shape[1] // active_groups if active_groups else 1, *kernel_size)
    if dy.numel() == 0 or x.numel() == 0:
        return x.new_zeros(shape)
    geometry = (kernel_size, stride, padding, dilation, active_groups)
    if x.dtype == torch.float64:
        return reference.fused_conv2d_wgrad(dy, dy_grad, x, x_norm, *geometry).contiguous()
    dw = torch.empty(shape, dtype=x.dtype, device=x.device)
    with on(x):
        dy, x = _channels_inside(dy), _channels_inside(x)
        pairs = (kernel_size, stride, padding, dilation)
        product = _product(dy, x, active_groups, *pairs, fused=dy_grad is not None)
        cut = _cut(product, 1, dy.numel() // dy.shape[1], splits)
        if cut.parts == 1:
            _multiply(product, cut, (0, 1), dy, x, dw, x_norm, dy_grad)
            return dw
        room = (1, cut.parts, *shape[:2], math.prod(kernel_size))
        partial = torch.empty(room, dtype=torch.float32, device=x.device)
        _multiply(product, cut, (0, 1), dy, x, partial, x_norm, dy_grad)
        sum_partials(partial, dw)
    return dw


def sample_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    splits: int | None = None,
) -> Tensor:
    """Return the full dw (K, C, R, S), summed over samples; zeros where no sample has the pair.

    Args:
        dy: (N, k, P, Q); channel ``j`` of sample ``n`` is channel ``out_idx[n, j]``.
        x: (N, c, H, W), likewise.
        weight_shape: K, C, R, S.
        in_idx: (N, c) int64, unique within a sample; None: all channels.
        out_idx: (N, k), likewise.
        stride, padding, dilation: two each.
        splits: parts that the pixels of a sample are summed in; None chooses.
    """
    if dy.numel() == 0 or x.numel() == 0:
        return x.new_zeros(tuple(weight_shape))
    if x.dtype == torch.float64:
        lists = (in_idx, out_idx, stride, padding, dilation)
        return reference.sample_conv2d_wgrad(dy, x, weight_shape, *lists)
    samples, (K, C, R, S) = x.shape[0], weight_shape
    dw = torch.empty((K, C, R, S), dtype=x.dtype, device=x.device)
    with on(x):
        dy, x = _channels_inside(dy), _channels_inside(x)
        product = _product(dy, x, 1, (R, S), stride, padding, dilation)
        cut = _cut(product, samples, dy.shape[2] * dy.shape[3], splits)
        places = positions(out_idx, K), positions(in_idx, C)
        # as many samples at a time as there is room for; the sum goes on in fp32
        at_once = max(1, min(samples, _PARTIAL_BYTES // (4 * product.entries * cut.parts)))
        room = (at_once, cut.parts, product.k, product.c, R * S)
        partial = torch.empty(room, dtype=torch.float32, device=x.device)
        total = dw if at_once == samples else torch.empty_like(dw, dtype=torch.float32)
        for first in range(0, samples, at_once):
            last = min(first + at_once, samples)
            _multiply(product, cut, (first, last), dy, x, partial)
            out, before = dw if last == samples else total, total if first else None
            sum_partials(partial[: last - first], out, before, *places, first)
    return dw

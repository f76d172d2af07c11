"""Channels moved between compact tensors: a sum over the union of channels, gather and scatter.

All are one pass: every channel of the output looks its place in the inputs up. Outputs are
matrices: rows of samples (NCHW) or pixels (NHWC), columns of all else.

Legend: N batch, C channels (``k`` active), ``a``, ``b`` channels of terms, ``u`` of their sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.layout import layout
from dcx_kernels.kernels.triton._launch import aligned, cdiv, kernel, on
from dcx_kernels.kernels.triton._math import cast
from dcx_kernels.kernels.triton._walk import fold, stride_in
from dcx_kernels.kernels.triton.norm_act import matrix_tile

__all__ = ["gather", "scatter", "union_add"]

# channels are copied as integers: any bits, of any dtype
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@kernel()
def _places_kernel(a_idx_ptr, b_idx_ptr, places_ptr, a, b, size, BLOCK: tl.constexpr):
    """Write where each of ``size`` channels stands in the lists, -1 if nowhere: (2, size) int32."""
    which = tl.program_id(0)
    places_ptr += which * size
    lane = tl.arange(0, BLOCK)
    nowhere = tl.full((BLOCK,), -1, tl.int32)
    for first in range(0, size, BLOCK):
        tl.store(places_ptr + first + lane, nowhere, first + lane < size)
    # one program a list, so that a barrier orders its writes
    tl.debug_barrier()
    count = tl.where(which == 0, a, b)
    for first in range(0, count, BLOCK):
        i = first + lane
        if which == 0:
            channel = tl.load(a_idx_ptr + i, i < count, other=0)
        else:
            channel = tl.load(b_idx_ptr + i, i < count, other=0)
        tl.store(places_ptr + channel, i, i < count)


@triton.jit
def _load_term(
    x_ptr, places_ptr, r, c, inside, channels, pixels, x_row, x_step, ALIGNED: tl.constexpr
):
    """Load what a term, whose rows are ``x_step`` apart, has at rows and columns of the output."""
    if places_ptr is None:
        if ALIGNED:
            x_row = (x_row // 8) * 8
        x = tl.load(x_ptr + r * x_row + c[None, :], inside, other=0)
    else:
        place = tl.load(places_ptr + (c // pixels) % channels).to(tl.int32)
        at = c // (pixels * channels) * x_step + place * pixels + c % pixels
        x = tl.load(x_ptr + r * x_row + at[None, :], inside & (place >= 0)[None, :], other=0)
    return x


@kernel("a_ptr", "b_ptr", "y_ptr")
def _assemble_kernel(
    a_ptr, b_ptr, y_ptr, a_places_ptr, b_places_ptr,
    rows, cols, channels, pixels, a_row, a_step, b_row, b_step,
    ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        cols = (cols // 8) * 8
    r, c, inside = matrix_tile(rows, cols, BLOCK_R, BLOCK_C)
    y = _load_term(a_ptr, a_places_ptr, r, c, inside, channels, pixels, a_row, a_step, ALIGNED)
    if b_ptr is not None:
        b = _load_term(b_ptr, b_places_ptr, r, c, inside, channels, pixels, b_row, b_step, ALIGNED)
        y = cast(y.to(tl.float32) + b.to(tl.float32), y_ptr.dtype.element_ty)
    tl.store(y_ptr + r * cols + c[None, :], y, inside)


def _places(a_idx: Tensor, b_idx: Tensor | None, size: int) -> Tensor:
    """Invert index lists; see `_places_kernel`."""
    lists = 1 if b_idx is None else 2
    places = torch.empty((lists, size), dtype=torch.int32, device=a_idx.device)
    a_idx = a_idx.contiguous()
    b_idx = a_idx if b_idx is None else b_idx.contiguous()
    with on(a_idx):
        _places_kernel[(lists,)](
            a_idx, b_idx, places, a_idx.shape[0], b_idx.shape[0], size, BLOCK=1024
        )
    return places


def _assemble(
    y: Tensor, a: Tensor, b: Tensor | None, a_places: Tensor | None, b_places: Tensor | None
) -> None:
    """Write y, as `_form` has it, from terms; places None: the channels are those of y."""
    batch, channels = y.shape[:2]
    pixels = y.shape[2:].numel()
    planar = layout(y) == torch.contiguous_format and pixels != 1
    a, a_stride = _inlayout(a, planar)
    b, b_stride = (None, 0) if b is None else _inlayout(b, planar)
    rows, cols = (batch, channels * pixels) if planar else (batch * pixels, channels)
    # what is loaded as it is stored: 16 bytes at a time, if it can be
    alike = ((a, a_places, a_stride), (b, b_places, b_stride))
    strides = tuple(stride for x, places, stride in alike if x is not None and places is None)
    times = fold(rows, cols, (cols, *strides))
    rows, cols = rows // times, cols * times
    block_r, block_c = (64, 64) if rows >= 32 else (4, 1024)
    with on(y):
        _assemble_kernel[(cdiv(rows, block_r) * cdiv(cols, block_c),)](
            a, b, y, a_places, b_places, rows, cols, channels, pixels if planar else 1,
            a_stride * times, a_stride, b_stride * times, b_stride,
            ALIGNED=all(stride * times % 8 == 0 for stride in strides) and cols % 8 == 0,
            BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip


def _inlayout(x: Tensor, planar: bool) -> tuple[Tensor, int]:
    """Return x and its stride, as `Walk` has it; a copy if x is not in that form."""
    x = aligned(x)
    stride = stride_in(x, planar)
    if stride is None:
        last = not planar and x.shape[2:].numel() != 1
        form = torch.channels_last if last else torch.contiguous_format
        x = x.contiguous(memory_format=form)
        stride = stride_in(x, planar)
        assert stride is not None
    return x, stride


def union_add(a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int) -> Tensor:
    """Add a (N, a, ...) and b (N, b, ...) at their places among ``num_out`` channels.

    Args:
        a, b: fp16, bf16 or fp32, also mixed; the reference serves float64.
        a_idx, b_idx: place of each channel in the sum, sorted unique int64.

    Returns:
        (N, num_out, ...), channels_last if a term is, of the promoted dtype.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    if dtype == torch.float64 or not dtype.is_floating_point:
        return reference.union_add(a, b, a_idx, b_idx, num_out)
    last = torch.channels_last in (layout(a), layout(b))
    y = torch.empty(
        (a.shape[0], num_out, *a.shape[2:]),
        dtype=dtype,
        device=a.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    if y.numel():
        # as many as in the sum: these very channels, in order
        full_a, full_b = a_idx.shape[0] == num_out, b_idx.shape[0] == num_out
        places = None if full_a and full_b else _places(a_idx, b_idx, num_out)
        in_a = None if places is None or full_a else places[0]
        in_b = None if places is None or full_b else places[1]
        _assemble(y, a, b, in_a, in_b)
    return y


def gather(x: Tensor, active: Tensor) -> Tensor:
    """Copy the channels ``active`` (k,) int64 of dense x (N, C, ...): compact, any dtype."""
    if x.element_size() not in _BITS:
        return x.index_select(1, active)
    shape = (x.shape[0], active.shape[0], *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    if y.numel():
        bits = _BITS[x.element_size()]
        _assemble(y.view(bits), x.view(bits), None, active.contiguous(), None)
    return y


def scatter(x: Tensor, active: Tensor, size: int) -> Tensor:
    """Place compact x (N, k, ...) at channels ``active`` of ``size``, zeros elsewhere; any dtype.

    The transpose of `gather`.
    """
    shape = (x.shape[0], size, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    if x.element_size() not in _BITS:
        return y.zero_().index_copy_(1, active, x)
    if y.numel():
        bits = _BITS[x.element_size()]
        _assemble(y.view(bits), x.view(bits), None, _places(active, None, size)[0], None)
    return y

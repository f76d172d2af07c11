"""Convolution as an implicit matrix product: forward and dgrad are one kernel.

Rows of the product are output pixels, columns are output channels (``j``), the reduction runs over
filter taps and input channels (``i``). Nothing is unfolded in memory: the source is read pixel by
pixel, and the weight either through index lists, where it is full, or directly, where it is packed.
A set of index lists serves all samples, or every sample has its own (stride 0 or not).

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. dgrad swaps the roles: the source is dy, ``i`` are out channels, ``j`` in.
"""

import triton.language as tl

from dcx_kernels.kernels.triton._launch import kernel
from dcx_kernels.kernels.triton._math import cast, dot
from dcx_kernels.kernels.triton._operands import activate, gradient_before, gradient_behind

__all__ = ["ACTIVATE", "BEFORE", "BEHIND", "BEHIND_RELU", "PLAIN", "channel_conv2d_kernel"]

# what is done to the source while it is loaded, see `dcx_kernels.kernels.norm`
PLAIN, ACTIVATE, BEFORE, BEHIND, BEHIND_RELU = range(5)
_PLAIN, _ACTIVATE, _BEFORE = tl.constexpr(PLAIN), tl.constexpr(ACTIVATE), tl.constexpr(BEFORE)
_BEHIND_RELU = tl.constexpr(BEHIND_RELU)


@kernel("src_ptr", "src_y_ptr", "w_ptr", "dst_ptr", "dst_y_ptr")
def channel_conv2d_kernel(
    # source [N, i, SH, SW]; y of the norm that its gradient is of, with the same strides
    src_ptr, src_y_ptr, stride_sn, stride_sh, stride_sw, stride_sc, SH, SW,
    # norm of the source: vectors over i
    scale_ptr, center_ptr, shift_ptr, slope_ptr, offset_ptr,
    # weight; element (i, j, tap) lies at i * stride_wi + j * stride_wj + w_base + its tap's strides
    w_ptr, w_base, stride_wi, stride_wj, stride_tr, stride_ts,
    # index lists into a full weight, and how many in channels a group of it has
    i_idx_ptr, j_idx_ptr, stride_ii, stride_ji, per_group,
    # destination [N, j, P, Q], bias over j
    dst_ptr, dst_base, stride_dn, stride_dh, stride_dw, stride_dc, bias_ptr,
    # norm of the destination: what the gradient is taken behind; y with the strides of dst
    dst_y_ptr, dst_scale_ptr, dst_center_ptr, dst_shift_ptr,
    # reductions [sets, tiles, 2, all j]: moments of dst, or gradients of scale and shift
    partial_ptr, first_tile, num_partials,
    # geometry, see _geometry.Axis
    P, Q, src_stride_h, src_stride_w, base_h, base_w, tap_step_h, tap_step_w, taps_r, taps_s,
    # extents: samples of a set, channels of a group, groups
    samples, num_i, num_j, groups,
    SOURCE: tl.constexpr, MOMENTS: tl.constexpr, MASK: tl.constexpr,
    J_IS_IN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGNED_I: tl.constexpr, ALIGNED_J: tl.constexpr, W_UNIT: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BLOCK_M pixels, BLOCK_J channels] of one group and set.

    ALIGNED_I, ALIGNED_J: the channel counts and all strides between pixels are multiples of VECTOR
    elements (16 bytes). W_UNIT: the weight is contiguous along "i", "j" or neither ("").
    """
    rows = samples * P * Q
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_j = tl.cdiv(num_j, BLOCK_J)
    pid = tl.program_id(0)
    tile_j = pid % tiles_j  # neighbours share pixels, which are many, rather than weights
    tile_m = pid // tiles_j % tiles_m
    group = pid // (tiles_j * tiles_m) % groups
    one_set = pid // (tiles_j * tiles_m * groups)

    # division and multiplication tell the compiler what an argument is a multiple of
    if ALIGNED_I:
        num_i = num_i // VECTOR * VECTOR
        if CHANNELS_LAST:
            stride_sn = stride_sn // VECTOR * VECTOR
            stride_sh = stride_sh // VECTOR * VECTOR
            stride_sw = stride_sw // VECTOR * VECTOR
        if W_UNIT == "i":
            stride_wj = stride_wj // VECTOR * VECTOR
            stride_tr = stride_tr // VECTOR * VECTOR
            stride_ts = stride_ts // VECTOR * VECTOR
            w_base = w_base // VECTOR * VECTOR
    if ALIGNED_J:
        num_j = num_j // VECTOR * VECTOR
        if CHANNELS_LAST:
            stride_dn = stride_dn // VECTOR * VECTOR
            stride_dh = stride_dh // VECTOR * VECTOR
            stride_dw = stride_dw // VECTOR * VECTOR
            dst_base = dst_base // VECTOR * VECTOR
        if W_UNIT == "j":
            stride_wi = stride_wi // VECTOR * VECTOR
            stride_tr = stride_tr // VECTOR * VECTOR
            stride_ts = stride_ts // VECTOR * VECTOR
            w_base = w_base // VECTOR * VECTOR
    if CHANNELS_LAST:
        stride_sc = 1
        stride_dc = 1

    # this tile's pixels
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_m = m < rows
    n = (one_set * samples + m // (P * Q)).to(tl.int64)
    p, q = m // Q % P, m % Q
    h0, w0 = p * src_stride_h + base_h, q * src_stride_w + base_w
    src_rows = src_ptr + n * stride_sn  # [BLOCK_M] pointers: int32 does for the rest of the way
    if src_y_ptr is not None:
        src_y_rows = src_y_ptr + n * stride_sn

    # this tile's channels, their weights
    offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    ok_j = offs_j < num_j
    j = group * num_j + offs_j  # [BLOCK_J] among the compact channels of dst
    if j_idx_ptr is not None:
        wj = tl.load(j_idx_ptr + one_set * stride_ji + j, mask=ok_j, other=0).to(tl.int32)
        if J_IS_IN:
            wj = wj % per_group
    elif J_IS_IN:
        wj = offs_j
    else:
        wj = j

    acc = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
    blocks_i = tl.cdiv(num_i, BLOCK_I)
    for step in range(taps_r * taps_s * blocks_i):
        tap = step // blocks_i
        tr = tap // taps_s
        ts = tap - tr * taps_s
        offs_i = (step - tap * blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        ok_i = offs_i < num_i
        i = group * num_i + offs_i
        h, w = h0 + tr * tap_step_h, w0 + ts * tap_step_w
        inside = ok_m & (h >= 0) & (h < SH) & (w >= 0) & (w < SW)
        ok = inside[:, None] & ok_i[None, :]
        at = (h * stride_sh + w * stride_sw)[:, None] + (i * stride_sc)[None, :]
        a = tl.load(src_rows[:, None] + at, mask=ok, other=0.0)  # [BLOCK_M, BLOCK_I]
        if SOURCE != _PLAIN:
            center = tl.load(center_ptr + i, mask=ok_i, other=0.0)[None, :]
            if SOURCE == _ACTIVATE:
                scale = tl.load(scale_ptr + i, mask=ok_i, other=0.0)[None, :]
                shift = tl.load(shift_ptr + i, mask=ok_i, other=0.0)[None, :]
                v = activate(a, scale, center, shift)
            else:
                y = tl.load(src_y_rows[:, None] + at, mask=ok, other=0.0)
                slope = tl.load(slope_ptr + i, mask=ok_i, other=0.0)[None, :]
                offset = tl.load(offset_ptr + i, mask=ok_i, other=0.0)[None, :]
                if SOURCE == _BEFORE:
                    v = gradient_before(a, y, center, slope, offset)
                else:
                    scale = tl.load(scale_ptr + i, mask=ok_i, other=0.0)[None, :]
                    shift = tl.load(shift_ptr + i, mask=ok_i, other=0.0)[None, :]
                    v = gradient_behind(
                        a, y, scale, shift, center, slope, offset, SOURCE == _BEHIND_RELU
                    )
            # padding is zero behind the norm, whatever the norm makes of zero
            a = cast(tl.where(ok, v, 0.0), a.dtype)
        if i_idx_ptr is not None:
            wi = tl.load(i_idx_ptr + one_set * stride_ii + i, mask=ok_i, other=0).to(tl.int32)
            if not J_IS_IN:
                wi = wi % per_group
        elif J_IS_IN:
            wi = i
        else:
            wi = offs_i
        if W_UNIT == "i":
            at_w = wi[:, None] + (wj * stride_wj)[None, :]
        elif W_UNIT == "j":
            at_w = (wi * stride_wi)[:, None] + wj[None, :]
        else:
            at_w = (wi * stride_wi)[:, None] + (wj * stride_wj)[None, :]
        taps = w_base + tr * stride_tr + ts * stride_ts
        b = tl.load(w_ptr + taps + at_w, mask=ok_i[:, None] & ok_j[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)

    if bias_ptr is not None:
        wide = j
        if j_idx_ptr is not None:
            wide = tl.load(j_idx_ptr + one_set * stride_ji + j, mask=ok_j, other=0).to(tl.int32)
        acc += tl.load(bias_ptr + wide, mask=ok_j, other=0.0).to(tl.float32)[None, :]
    ok = ok_m[:, None] & ok_j[None, :]
    at = (dst_base + p * stride_dh + q * stride_dw)[:, None] + (j * stride_dc)[None, :]
    at = (n * stride_dn)[:, None] + at
    out = cast(acc, dst_ptr.dtype.element_ty)
    if MASK:
        scale = tl.load(dst_scale_ptr + j, mask=ok_j, other=0.0)[None, :]
        center = tl.load(dst_center_ptr + j, mask=ok_j, other=0.0)[None, :]
        shift = tl.load(dst_shift_ptr + j, mask=ok_j, other=0.0)[None, :]
        centered = tl.load(dst_y_ptr + at, mask=ok, other=0.0).to(tl.float32) - center
        dh = tl.where(ok & (centered * scale + shift > 0), acc, 0.0)
        out = cast(dh * scale, dst_ptr.dtype.element_ty)
    tl.store(dst_ptr + at, out, mask=ok)

    if MOMENTS or MASK:
        all_j = groups * num_j
        tile = one_set * num_partials + first_tile + tile_m
        to = partial_ptr + tile.to(tl.int64) * 2 * all_j + j
        if MOMENTS:  # of what was stored; about this tile's own mean: nothing cancels
            v = out.to(tl.float32)
            first = tl.sum(tl.where(ok, v, 0.0), 0) / tl.minimum(BLOCK_M, rows - tile_m * BLOCK_M)
            deviation = tl.where(ok, v - first[None, :], 0.0)
            second = tl.sum(deviation * deviation, 0)
        else:
            first, second = tl.sum(dh * centered, 0), tl.sum(dh, 0)
        tl.store(to, first, mask=ok_j)
        tl.store(to + all_j, second, mask=ok_j)

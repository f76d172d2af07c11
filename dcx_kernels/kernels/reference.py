"""ATen kernels: the definition of every operator, the oracle of every other backend, the fallback.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. "Compact" tensors hold active channels only; index lists are sorted unique
int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "channel_batch_norm_bwd",
    "channel_batch_norm_fwd",
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "channel_linear_dgrad",
    "channel_linear_fwd",
    "channel_linear_wgrad",
    "gather_rows",
    "pack",
    "row_index",
    "scatter_rows_",
    "unpack",
]

# overloads by name: resolving them anew costs 10 us a call
_convolution_backward = torch.ops.aten.convolution_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.default
_native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


# --- moving weights: the active slice of a weight is a list of rows of a 2-D view -----------------


def row_index(
    shape: Sequence[int],
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int = 1,
    active_groups: int = 1,
) -> tuple[Tensor, int]:
    """List the rows of the active slice, in compact order.

    A weight ``(K, C / G, *rest)`` is viewed as rows of ``rest`` elements (of ``C / G * rest`` when
    all inputs are active), so that packing is one ``index_select`` of contiguous rows.

    Returns:
        Row numbers (1-D int64) and the length of a row in elements.
    """
    num_out, row = shape[0], math.prod(shape[1:])
    if in_idx is None or len(shape) == 1:
        assert out_idx is not None
        return out_idx, row
    per_group = shape[1]
    if out_idx is None:
        out_idx = torch.arange(num_out, device=in_idx.device)
    if groups == 1:
        rows = out_idx.unsqueeze(1) * per_group + in_idx
    else:  # [G_act, k / G_act, 1] * C/G + [G_act, 1, c / G_act]
        local = (in_idx % per_group).view(active_groups, 1, -1)
        rows = out_idx.view(active_groups, -1, 1) * per_group + local
    return rows.flatten(), row // per_group


def gather_rows(dense: Tensor, rows: Tensor, row: int, out: Tensor | None = None) -> Tensor:
    """Copy rows of ``dense`` (contiguous) into a (num_rows, row) tensor, or into ``out``."""
    source = dense.reshape(-1, row)
    if out is None:
        return source.index_select(0, rows)
    return torch.index_select(source, 0, rows, out=out.view(-1, row))


def scatter_rows_(dense: Tensor, packed: Tensor, rows: Tensor, row: int) -> None:
    """Write ``packed`` back into the rows of ``dense`` it was gathered from."""
    # index_put_ runs on all threads, index_copy_ on one
    dense.view(-1, row).index_put_((rows,), packed.reshape(-1, row))


def pack(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int = 1,
    active_groups: int = 1,
) -> Tensor:
    """Copy the active slice of ``weight`` (K, C / G, *rest) into a new (k, c / G_act, *rest)."""
    if out_idx is None and in_idx is None:
        return weight.clone(memory_format=torch.contiguous_format)
    rows, row = row_index(weight.shape, out_idx, in_idx, groups, active_groups)
    num_out = weight.shape[0] if out_idx is None else out_idx.shape[0]
    return gather_rows(weight, rows, row).view(_packed_shape(weight.shape, num_out, rows, row))


def unpack(
    packed: Tensor,
    shape: Sequence[int],
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int = 1,
    active_groups: int = 1,
) -> Tensor:
    """Return zeros of ``shape`` with ``packed`` at the active slice: the transpose of `pack`."""
    if out_idx is None and in_idx is None:
        return packed.clone(memory_format=torch.contiguous_format)
    dense = packed.new_zeros(tuple(shape))
    rows, row = row_index(shape, out_idx, in_idx, groups, active_groups)
    scatter_rows_(dense, packed, rows, row)
    return dense


def _packed_shape(shape: Sequence[int], num_out: int, rows: Tensor, row: int) -> tuple[int, ...]:
    if len(shape) == 1:
        return (num_out,)
    rest = tuple(shape[2:])
    return (num_out, rows.shape[0] * row // (num_out * math.prod(rest)), *rest)


# --- convolution and linear: weights are full with index lists, or packed without -----------------


def channel_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
) -> Tensor:
    """Convolve compact x (N, c, H, W) with the active slice of the weight: y (N, k, P, Q).

    ``weight`` (K, C / G, R, S) and ``bias`` (K,) are full, or already packed (k, c / G_act, R, S),
    (k,) when the index lists are None.
    """
    weight = _pack_or_same(weight, out_idx, in_idx, groups, active_groups)
    bias = _select(bias, out_idx)
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], active_groups
    )


def channel_conv2d_dgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
) -> Tensor:
    """Return dx (N, c, H, W); ``x`` gives shape and layout only."""
    weight = _pack_or_same(weight, out_idx, in_idx, groups, active_groups)
    args = (dy, x, weight, None, stride, padding, dilation, False, [0, 0], active_groups)
    dx: Tensor = _convolution_backward(*args, [True, False, False])[0]
    return dx


def channel_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    """Return dw (k, c / G_act, R, S) of the active slice."""
    shape = (dy.shape[1], x.shape[1] // active_groups, *kernel_size)
    weight = x.new_empty(shape)  # only its shape is read; a stride of 0 would be made contiguous
    args = (dy, x, weight, None, stride, padding, dilation, False, [0, 0], active_groups)
    dw: Tensor = _convolution_backward(*args, [False, True, False])[1]
    return dw


def channel_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    inner: int,
) -> Tensor:
    """Return x (..., c * inner) times the active slice of weight (K, C * inner)^T, plus bias."""
    weight = _pack_linear(weight, in_idx, out_idx, inner)
    return torch.nn.functional.linear(x, weight, _select(bias, out_idx))


def channel_linear_dgrad(
    dy: Tensor, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, inner: int
) -> Tensor:
    """Return dx (..., c * inner)."""
    return dy @ _pack_linear(weight, in_idx, out_idx, inner)


def channel_linear_wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """Return dw (k, c * inner) of the active slice."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _pack_or_same(
    weight: Tensor,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    groups: int,
    active_groups: int,
) -> Tensor:
    if out_idx is None and in_idx is None:
        return weight
    return pack(weight, out_idx, in_idx, groups, active_groups)


def _pack_linear(
    weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, inner: int
) -> Tensor:
    if out_idx is None and in_idx is None:
        return weight
    per_channel = weight.view(weight.shape[0], -1, inner)
    return pack(per_channel, out_idx, in_idx).flatten(1)


def _select(vector: Tensor | None, idx: Tensor | None) -> Tensor | None:
    return vector if vector is None or idx is None else vector.index_select(0, idx)


# --- batch norm (+ ReLU), whose backward knows the saliency ---------------------------------------


def channel_batch_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise compact x (N, k, ...); the active entries of the running statistics are updated.

    Args:
        weight, bias: compact (k,).
        running_mean, running_var: full (K,), read and written at ``active`` only.
        active: index list (k,), or None when all channels are active.

    Returns:
        y, and the mean and inverse standard deviation used, (k,) each.
    """
    if training and x.numel() == 0:  # an empty batch leaves the statistics alone, as in torch
        nothing = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        return x.clone(), nothing, nothing.clone()
    mean_c, var_c = _select(running_mean, active), _select(running_var, active)
    y, mean, invstd = torch.native_batch_norm(
        x, weight, bias, mean_c, var_c, training, momentum, eps
    )
    if not training:
        assert mean_c is not None and var_c is not None
        mean, invstd = mean_c.clone(), torch.rsqrt(var_c + eps)
    elif active is not None and running_mean is not None and running_var is not None:
        assert mean_c is not None and var_c is not None
        running_mean.index_copy_(0, active, mean_c)
        running_var.index_copy_(0, active, var_c)
    return (y.relu_() if relu else y), mean, invstd


def channel_batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `channel_batch_norm_fwd`; the saliency falls out of the same reductions.

    With h the output of the norm before the activation, ``sum (dL/dh) h = weight * dweight + bias *
    dbias`` (DCE eq. 2, DCP eq. 7, behind a batch norm), so the batch reduction costs O(k).

    Args:
        y: the output if ReLU was fused, else None.
        per_sample: return the saliency of every sample, (N, k), instead of its sum, (k,).

    Returns:
        dx, dweight (k,), dbias (k,), and the signed sum of (dL/dh) h.
    """
    dh = dy if y is None else _threshold_backward(dy, y, 0)
    if training and x.numel():
        dx, dweight, dbias = _native_batch_norm_backward(
            dh, x, weight, None, None, mean, invstd, True, eps, [True, True, True]
        )
    else:
        dx, dweight, dbias = _frozen_batch_norm_bwd(dh, x, weight, mean, invstd)
    if per_sample:
        # behind a ReLU y stands for h: where they differ dh is zero
        h = y if y is not None else _affine(_normalise(x, mean, invstd), weight, bias)
        return dx, dweight, dbias, (dh.to(mean.dtype) * h).flatten(2).sum(2)
    signed = dweight.clone() if weight is None else weight * dweight
    return dx, dweight, dbias, signed if bias is None else signed + bias * dbias


def _frozen_batch_norm_bwd(
    dh: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    over = [dim for dim in range(x.dim()) if dim != 1]
    dbias = dh.sum(over, dtype=mean.dtype)
    dweight = (dh * _normalise(x, mean, invstd)).sum(over, dtype=mean.dtype)
    scale = invstd if weight is None else invstd * weight
    return (dh * _channels(scale, x)).to(x.dtype), dweight, dbias


def _normalise(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (x - _channels(mean, x)) * _channels(invstd, x)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * _channels(weight, x)
    return x if bias is None else x + _channels(bias, x)


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))

"""Batch norm (+ ReLU), whose backward knows the saliency."""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.reference.vectors import per_channel, select

__all__ = ["channel_batch_norm_bwd", "channel_batch_norm_fwd"]


# overloads by name: resolving them anew costs 10 us a call
_threshold_backward = torch.ops.aten.threshold_backward.default
_native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


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
    mean_c, var_c = select(running_mean, active), select(running_var, active)
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
        return dx, dweight, dbias, (dh.to(mean.dtype) * h).unsqueeze(2).flatten(2).sum(2)
    signed = dweight.clone() if weight is None else weight * dweight
    return dx, dweight, dbias, signed if bias is None else signed + bias * dbias


def _frozen_batch_norm_bwd(
    dh: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    over = [dim for dim in range(x.dim()) if dim != 1]
    dbias = dh.sum(over, dtype=mean.dtype)
    dweight = (dh * _normalise(x, mean, invstd)).sum(over, dtype=mean.dtype)
    scale = invstd if weight is None else invstd * weight
    return (dh * per_channel(scale, x)).to(x.dtype), dweight, dbias


def _normalise(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (x - per_channel(mean, x)) * per_channel(invstd, x)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * per_channel(weight, x)
    return x if bias is None else x + per_channel(bias, x)

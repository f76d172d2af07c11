"""Convolutions between norms: what a fused kernel computes in one pass, written out in ATen.

A norm before the convolution is applied to x as it is loaded; the statistics of a norm behind it
are taken of y as it is stored; gradients pass both norms as they are loaded (`NormGrad`). Here each
of these is a pass of its own, over temporary tensors.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. Vectors and sums are float32, float64 in float64 networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.reference.convolution import (
    channel_conv2d_dgrad,
    channel_conv2d_fwd,
    channel_conv2d_wgrad,
)
from dcx_kernels.kernels.reference.vectors import per_channel, select

__all__ = [
    "fused_conv2d_dgrad",
    "fused_conv2d_fwd",
    "fused_conv2d_wgrad",
    "norm_act_bwd",
    "norm_act_fwd",
    "norm_fold",
    "norm_fold_bwd",
]


def fused_conv2d_fwd(
    x: Tensor,
    x_norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve z, which is x or, with ``x_norm``, max(h, 0); padding is zeros around z.

    Weight, bias and lists: see `channel_conv2d_fwd`.

    Returns:
        y (N, k, P, Q); with ``statistics`` the mean of y and the sum of squared differences from
        it, (k,) each, else two empty tensors.
    """
    z = _activated(x, x_norm)
    y = channel_conv2d_fwd(
        z, weight, bias, in_idx, out_idx, stride, padding, dilation, groups, active_groups
    )
    if not statistics:
        return y, *_nothing(y)
    over, wide = (0, 2, 3), y.to(_accumulator(y))
    if y.shape[0] == 0:
        return y, wide.sum(over), wide.sum(over)
    mean = wide.mean(over)
    return y, mean, (wide - per_channel(mean, y)).square().sum(over)


def fused_conv2d_dgrad(
    dy: Tensor,
    dy_grad: NormGrad | None,
    x: Tensor,
    x_norm: Norm | None,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `fused_conv2d_fwd` by x and by the norm that it applied.

    Args:
        dy: (N, k, P, Q), which ``dy_grad`` turns into the gradient of y, if it is given.
        per_sample: return the sums of every sample, (N, c), instead of those over the batch, (c,).

    Returns:
        dx (N, c, H, W); without ``x_norm`` two empty tensors, with it dscale, the sum of
        (dL/dh) (x - center), and dshift, that of dL/dh.
    """
    dz = channel_conv2d_dgrad(
        _gradient(dy, dy_grad), x, weight, in_idx, out_idx, stride, padding, dilation, groups,
        active_groups,
    )  # fmt: skip
    if x_norm is None:
        return dz, *_nothing(x)
    dh = _behind_relu(dz, x, x_norm)
    dx = (dh * per_channel(x_norm.scale, x)).to(x.dtype)
    return dx, *_sums(dh, x, x_norm, per_sample)


def fused_conv2d_wgrad(
    dy: Tensor,
    dy_grad: NormGrad | None,
    x: Tensor,
    x_norm: Norm | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    """Return dw (k, c / G_act, R, S) of the active slice; for dy see `fused_conv2d_dgrad`."""
    return channel_conv2d_wgrad(
        _gradient(dy, dy_grad), _activated(x, x_norm), kernel_size, stride, padding, dilation,
        active_groups,
    )  # fmt: skip


def norm_act_fwd(y: Tensor, norm: Norm, relu: bool) -> Tensor:
    """Return z (N, k, P, Q), of y's dtype: h, or max(h, 0) with ``relu``."""
    h = _affine(y, norm)
    return (h.relu_() if relu else h).to(y.dtype)


def norm_act_bwd(
    dz: Tensor, y: Tensor, norm: Norm, relu: bool, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """Return dscale, the sum of (dL/dh) (y - center), and dshift, that of dL/dh.

    Over the batch, (k,), or ``per_sample``, (N, k). The gradient of y is left to who loads dz.
    """
    dh = _behind_relu(dz, y, norm) if relu else dz.to(norm.scale.dtype)
    return _sums(dh, y, norm, per_sample)


def norm_fold(
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor | None,
    count: int,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold a batch norm into the vectors of a `Norm`; training moves the running statistics.

    Args:
        mean, m2: of the batch, see `fused_conv2d_fwd`; empty, unless ``training``.
        weight, bias: compact (k,).
        running_mean, running_var: full (K,), read or written at ``active`` only.
        active: index list (k,), or None when all channels are active.
        count: N * P * Q.

    Returns:
        scale, center, shift and the inverse standard deviation, (k,) each.
    """
    wide = mean.dtype
    if training:
        _move(running_mean, mean, active, momentum)
        _move(running_var, m2 / max(count - 1, 1), active, momentum)
        center, variance = mean.clone(), m2 / max(count, 1)
    else:
        chosen = select(running_mean, active), select(running_var, active)
        assert chosen[0] is not None and chosen[1] is not None
        center, variance = chosen[0].to(wide, copy=True), chosen[1].to(wide)
    invstd = torch.rsqrt(variance + eps)
    scale = invstd.clone() if weight is None else invstd * weight.to(wide)
    shift = torch.zeros_like(scale) if bias is None else bias.to(wide, copy=True)
    return scale, center, shift, invstd


def norm_fold_bwd(
    dscale: Tensor,
    dshift: Tensor,
    scale: Tensor,
    shift: Tensor,
    invstd: Tensor,
    count: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `norm_fold`.

    Args:
        dscale, dshift: (k,), or those of each sample, (N, k).

    Returns:
        dweight, dbias, slope and offset of the `NormGrad` (zeros in evaluation), (k,) each, and
        the signed sum of (dL/dh) h, of dscale's shape.
    """
    saliency = scale * dscale + shift * dshift
    if dscale.dim() == 2:
        dscale, dshift = dscale.sum(0), dshift.sum(0)
    if training:
        share = scale / -max(count, 1)
        slope, offset = share * invstd.square() * dscale, share * dshift
    else:
        slope, offset = torch.zeros_like(scale), torch.zeros_like(scale)
    return invstd * dscale, dshift.clone(), slope, offset, saliency


def _move(running: Tensor | None, new: Tensor, active: Tensor | None, momentum: float) -> None:
    if running is None:
        return
    old = running if active is None else running.index_select(0, active)
    moved = (momentum * new + (1 - momentum) * old.to(new.dtype)).to(running.dtype)
    if active is None:
        running.copy_(moved)
    else:
        running.index_copy_(0, active, moved)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _nothing(like: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(like)
    return like.new_empty(0, dtype=dtype), like.new_empty(0, dtype=dtype)


def _affine(y: Tensor, norm: Norm) -> Tensor:
    scale, center, shift = (per_channel(vector, y) for vector in norm)
    return (y.to(norm.scale.dtype) - center) * scale + shift


def _activated(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm_act_fwd(x, norm, True)


def _behind_relu(dz: Tensor, y: Tensor, norm: Norm) -> Tensor:
    return torch.where(_affine(y, norm) > 0, dz.to(norm.scale.dtype), 0)


def _sums(dh: Tensor, y: Tensor, norm: Norm, per_sample: bool) -> tuple[Tensor, Tensor]:
    over = (2, 3) if per_sample else (0, 2, 3)
    return (dh * (y.to(dh.dtype) - per_channel(norm.center, y))).sum(over), dh.sum(over)


def _gradient(dy: Tensor, grad: NormGrad | None) -> Tensor:
    """Return the gradient of y, of dy's dtype."""
    if grad is None:
        return dy
    total = dy.to(grad.center.dtype)
    if grad.norm is not None:
        if grad.relu:
            total = _behind_relu(dy, grad.y, grad.norm)
        total = total * per_channel(grad.norm.scale, dy)
    center, slope, offset = (
        per_channel(vector, dy) for vector in (grad.center, grad.slope, grad.offset)
    )
    return (total + (grad.y.to(total.dtype) - center) * slope + offset).to(dy.dtype)

"""Autograd of convolutions between norms: what they save, and what they hand back.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.ops._conv import batch_saliency
from dcx_kernels.ops.fused_conv2d import (
    flat_grad,
    fused_conv2d_dgrad,
    fused_conv2d_fwd,
    fused_conv2d_wgrad,
    norm_act_bwd,
    norm_act_fwd,
    norm_fold,
    norm_fold_bwd,
)
from dcx_kernels.ops.weights import pack_weight, unpack_weight

__all__ = [
    "ConvNormActFunction",
    "ConvNormFunction",
    "Geometry",
    "NormActFunction",
    "NormConvFunction",
]

# stride, padding, dilation, groups, active groups
Geometry = tuple[list[int], list[int], list[int], int, int]


def _one_for_all(vector: Tensor | None) -> Tensor | None:
    """Return (k,) of a vector that was expanded to (N, k), so that its gradient has samples."""
    return vector if vector is None or vector.dim() == 1 else vector[0]


def _conv_backward(
    ctx: Any,
    saved: tuple[Any, ...],
    dy: Tensor,
    grad: NormGrad | None,
    sum_dy: Tensor | None,
    needs_weight: bool,
) -> tuple[Tensor | None, ...]:
    """Differentiate the convolution whose tensors were saved first.

    Args:
        sum_dy: sum of the gradient of y over batch and pixels, where it is needed.

    Returns:
        dx, dscale, dshift of the norm before it, dw of the active slice, and dbias.
    """
    x, scale, center, shift, weight, bias, in_idx, out_idx = saved[:8]
    *window, _, active = ctx.geometry
    before, grads = (scale, center, shift), flat_grad(grad)
    dx = dscale = dshift = dw = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dx, dscale, dshift = fused_conv2d_dgrad(
            dy, *grads, x, *before, weight, in_idx, out_idx, *ctx.geometry, ctx.input_per_sample
        )
    if needs_weight:
        dw = fused_conv2d_wgrad(dy, *grads, x, *before, list(weight.shape[2:]), *window, active)
    db = None if sum_dy is None or bias is None else sum_dy.to(bias.dtype)
    return dx, dscale if scale is not None else None, dshift if scale is not None else None, dw, db


def _unpacked(
    ctx: Any, saved: tuple[Any, ...], dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Scatter gradients of active slices into those of full weights and biases."""
    weight, bias, in_idx, out_idx = saved[4:8]
    *_, groups, active = ctx.geometry
    if dw is not None and (in_idx is not None or out_idx is not None):
        dw = unpack_weight(dw, list(weight.shape), out_idx, in_idx, groups, active)
    if db is not None and out_idx is not None:
        db = torch.zeros_like(bias).index_copy_(0, out_idx, db)
    return dw, db


class NormConvFunction(torch.autograd.Function):
    """A convolution that applies a norm and ReLU to x as it loads it; for ``probe`` see
    `ChannelConv2dFunction`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_scale: Tensor | None,
        x_center: Tensor | None,
        x_shift: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        in_idx: Tensor | None,
        out_idx: Tensor | None,
        geometry: Geometry,
        probe: Tensor | None,
    ) -> Tensor:
        before = (_one_for_all(x_scale), x_center, _one_for_all(x_shift))
        y: Tensor
        y, _, _ = fused_conv2d_fwd(x, *before, weight, bias, in_idx, out_idx, *geometry, False)
        ctx.save_for_backward(x, *before, weight, bias, in_idx, out_idx)
        ctx.geometry, ctx.has_probe = geometry, probe is not None
        ctx.per_sample = probe is not None and probe.dim() == 2
        ctx.input_per_sample = x_scale is not None and x_scale.dim() == 2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: hooks may have put them elsewhere
        x, scale, center, shift, weight, bias, in_idx, out_idx = saved
        per_batch = ctx.has_probe and not ctx.per_sample
        needs_bias = bias is not None and (ctx.needs_input_grad[5] or per_batch)
        sum_dy = dy.sum((0, 2, 3)) if needs_bias else None
        needs_weight = ctx.needs_input_grad[4] or per_batch
        dx, dscale, dshift, dw, db = _conv_backward(ctx, saved, dy, None, sum_dy, needs_weight)
        dprobe = None
        if per_batch:
            assert dw is not None
            packed, packed_bias = weight, bias
            if in_idx is not None or out_idx is not None:
                *_, groups, active = ctx.geometry
                packed = pack_weight(weight, out_idx, in_idx, groups, active)
                packed_bias = bias if bias is None or out_idx is None else bias[out_idx]
            dprobe = batch_saliency(packed, dw, packed_bias, db)
        elif ctx.has_probe:  # y again: what was returned may have been changed in place since
            y, _, _ = fused_conv2d_fwd(
                x, scale, center, shift, weight, bias, in_idx, out_idx, *ctx.geometry, False
            )
            dprobe = (dy.to(torch.promote_types(dy.dtype, torch.float32)) * y).flatten(2).sum(2)
        dw, db = _unpacked(ctx, saved, dw, db)
        return dx, dscale, None, dshift, dw, db, None, None, None, dprobe


def _conv_norm_forward(
    ctx: Any,
    x: Tensor,
    before: tuple[Tensor | None, Tensor | None, Tensor | None],
    conv: tuple[Tensor | None, ...],
    geometry: Geometry,
    norm: tuple[Tensor | None, ...],
    settings: tuple[bool, float, float],
    probe: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and the vectors scale, center, shift of the norm behind it; save what they are."""
    training, momentum, eps = settings
    vectors = (_one_for_all(before[0]), before[1], _one_for_all(before[2]))
    y, mean, m2 = fused_conv2d_fwd(x, *vectors, *conv, *geometry, training)
    count = y.shape[0] * y.shape[2] * y.shape[3]
    scale, center, shift, invstd = norm_fold(mean, m2, *norm, count, training, momentum, eps)
    gamma, beta = norm[:2]
    ctx.save_for_backward(x, *vectors, *conv, y, scale, center, shift, invstd)
    ctx.geometry, ctx.training, ctx.has_probe = geometry, training, probe is not None
    ctx.per_sample = probe is not None and probe.dim() == 2
    ctx.input_per_sample = before[0] is not None and before[0].dim() == 2
    ctx.dtypes = None if gamma is None else gamma.dtype, None if beta is None else beta.dtype
    return y, scale, center, shift


def _conv_norm_backward(
    ctx: Any,
    saved: tuple[Any, ...],
    d: Tensor,
    dscale: Tensor,
    dshift: Tensor,
    behind: Norm | None,
    relu: bool,
) -> tuple[Tensor | None, ...]:
    """Differentiate both by their inputs.

    Args:
        d: dy through scale and ReLU, or dz, if ``behind`` is given: the norm behind y, whose ReLU
            (``relu``) and scale are still to be applied.
        dscale, dshift: of the norm, (k,) or (N, k).
    """
    y, scale, center, shift, invstd = saved[8:]
    count = y.shape[0] * y.shape[2] * y.shape[3]
    dgamma, dbeta, slope, offset, saliency = norm_fold_bwd(
        dscale, dshift, scale, shift, invstd, count, ctx.training
    )
    grad = None
    if ctx.training or behind is not None:
        grad = NormGrad(y, center, slope, offset, behind, relu)
    sum_dy = None
    if ctx.needs_input_grad[5]:  # behind the statistics of a batch a constant is of no effect
        sum_dy = torch.zeros_like(scale) if ctx.training else scale * dbeta
    dx, dscale_x, dshift_x, dw, db = _conv_backward(
        ctx, saved, d, grad, sum_dy, ctx.needs_input_grad[4]
    )
    dw, db = _unpacked(ctx, saved, dw, db)
    gamma_dtype, beta_dtype = ctx.dtypes
    dgamma = None if gamma_dtype is None else dgamma.to(gamma_dtype)
    dbeta = None if beta_dtype is None else dbeta.to(beta_dtype)
    dprobe = saliency if ctx.has_probe else None
    nothing = (None,) * 3
    return (
        dx, dscale_x, None, dshift_x, dw, db, None, None, None, dgamma, dbeta, *nothing, None,
        dprobe,
    )  # fmt: skip


class ConvNormFunction(torch.autograd.Function):
    """A convolution and the vectors of the norm behind it: y, scale, center, shift.

    Whoever reads y reads it through these vectors, as h = (y - center) * scale + shift: dscale and
    dshift then tell all of the gradient that goes through center and the statistics.

    ``probe`` is zeros, (k,) or (N, k), whose gradient becomes the signed sum of (dL/dh) h. For the
    latter scale and shift are expanded to (N, k), so that readers hand back sums of each sample.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_scale: Tensor | None,
        x_center: Tensor | None,
        x_shift: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        in_idx: Tensor | None,
        out_idx: Tensor | None,
        geometry: Geometry,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        active: Tensor | None,
        settings: tuple[bool, float, float],
        probe: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, scale, center, shift = _conv_norm_forward(
            ctx, x, (x_scale, x_center, x_shift), (weight, bias, in_idx, out_idx), geometry,
            (gamma, beta, running_mean, running_var, active), settings, probe,
        )  # fmt: skip
        ctx.mark_non_differentiable(center)
        if ctx.per_sample:
            scale, shift = scale.expand(y.shape[0], -1), shift.expand(y.shape[0], -1)
        return y, scale, center, shift

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor, dscale: Tensor, dcenter: Any, dshift: Tensor
    ) -> tuple[Tensor | None, ...]:
        return _conv_norm_backward(ctx, ctx.saved_tensors, dy, dscale, dshift, None, False)


class ConvNormActFunction(torch.autograd.Function):
    """A convolution, the norm behind it, and ReLU if asked for: z; y is saved in its place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_scale: Tensor | None,
        x_center: Tensor | None,
        x_shift: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        in_idx: Tensor | None,
        out_idx: Tensor | None,
        geometry: Geometry,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        active: Tensor | None,
        settings: tuple[bool, float, float],
        probe: Tensor | None,
        relu: bool,
    ) -> Tensor:
        y, scale, center, shift = _conv_norm_forward(
            ctx, x, (x_scale, x_center, x_shift), (weight, bias, in_idx, out_idx), geometry,
            (gamma, beta, running_mean, running_var, active), settings, probe,
        )  # fmt: skip
        ctx.relu = relu
        z: Tensor = norm_act_fwd(y, scale, center, shift, relu)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        y, scale, center, shift, _ = saved[8:]
        dscale, dshift = norm_act_bwd(dz, y, scale, center, shift, ctx.relu, ctx.per_sample)
        behind = Norm(scale, center, shift)
        grads = _conv_norm_backward(ctx, saved, dz, dscale, dshift, behind, ctx.relu)
        return *grads, None


class NormActFunction(torch.autograd.Function):
    """Store z = max(h, 0) after all, for a reader that is not one of these convolutions."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, center: Tensor, shift: Tensor) -> Tensor:
        ctx.per_sample = scale.dim() == 2
        vectors = _one_for_all(scale), center, _one_for_all(shift)
        z: Tensor = norm_act_fwd(y, *vectors, True)
        ctx.save_for_backward(y, z, *vectors)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        y, z, scale, center, shift = ctx.saved_tensors
        dscale, dshift = norm_act_bwd(dz, y, scale, center, shift, True, ctx.per_sample)
        dy = (torch.where(z > 0, dz, 0) * scale.view(1, -1, 1, 1)).to(y.dtype)
        return dy, dscale, None, dshift

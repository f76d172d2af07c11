"""Between batch statistics and the vectors of a norm: everything of size (k,), in one launch each.

Legend: N batch, k active of K channels.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton._launch import cdiv, kernel, on
from dcx_kernels.kernels.triton._math import cast

__all__ = ["norm_fold", "norm_fold_bwd"]

_BLOCK = 128


@kernel()
def _norm_fold_fwd_kernel(
    mean_ptr, m2_ptr, weight_ptr, bias_ptr,  # (k,)
    running_mean_ptr, running_var_ptr, active_ptr,  # (K,) twice, (k,)
    vectors_ptr,  # [4, k], begins with scale: scale, center, shift, inverse standard deviation
    channels, count, momentum, eps,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < channels
    place = c
    if active_ptr is not None:
        place = tl.load(active_ptr + c, ok, other=0)
    if TRAINING:
        center = tl.load(mean_ptr + c, ok, other=0.0)
        m2 = tl.load(m2_ptr + c, ok, other=0.0)
        variance = m2 / tl.maximum(count, 1).to(tl.float32)
        if running_mean_ptr is not None:
            old = tl.load(running_mean_ptr + place, ok, other=0.0).to(tl.float32)
            new = momentum * center + (1.0 - momentum) * old
            tl.store(running_mean_ptr + place, cast(new, running_mean_ptr.dtype.element_ty), ok)
        if running_var_ptr is not None:
            old = tl.load(running_var_ptr + place, ok, other=0.0).to(tl.float32)
            unbiased = m2 / tl.maximum(count - 1, 1).to(tl.float32)
            new = momentum * unbiased + (1.0 - momentum) * old
            tl.store(running_var_ptr + place, cast(new, running_var_ptr.dtype.element_ty), ok)
    else:
        center = tl.load(running_mean_ptr + place, ok, other=0.0).to(tl.float32)
        variance = tl.load(running_var_ptr + place, ok, other=0.0).to(tl.float32)
    invstd = 1.0 / tl.sqrt_rn(variance + eps)
    scale, shift = invstd, tl.zeros((BLOCK,), tl.float32)
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, ok, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, ok, other=0.0).to(tl.float32)
    tl.store(vectors_ptr + c, scale, ok)
    tl.store(vectors_ptr + channels + c, center, ok)
    tl.store(vectors_ptr + 2 * channels + c, shift, ok)
    tl.store(vectors_ptr + 3 * channels + c, invstd, ok)


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
    """See `dcx_kernels.kernels.reference.norm_fold`."""
    if mean.dtype != torch.float32:
        return reference.norm_fold(
            mean, m2, weight, bias, running_mean, running_var, active, count, training, momentum,
            eps,
        )  # fmt: skip
    known = (mean if training else None, active, weight, bias, running_mean)
    channels = next(vector.shape[0] for vector in known if vector is not None)
    scale, center, shift, invstd = mean.new_empty((4, channels)).unbind()
    if channels:
        with on(mean):
            _norm_fold_fwd_kernel[(cdiv(channels, _BLOCK),)](
                mean if training else None, m2 if training else None, weight, bias,
                running_mean, running_var, active, scale,
                channels, count, momentum, eps, TRAINING=training, BLOCK=_BLOCK,
            )  # fmt: skip
    return scale, center, shift, invstd


@kernel()
def _norm_fold_bwd_kernel(
    dscale_ptr, dshift_ptr, scale_ptr, shift_ptr, invstd_ptr,
    vectors_ptr,  # [4, k]: dweight, dbias, slope, offset
    saliency_ptr,  # [sets, k]
    channels, sets, count,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < channels
    scale = tl.load(scale_ptr + c, ok, other=0.0)
    shift = tl.load(shift_ptr + c, ok, other=0.0)
    invstd = tl.load(invstd_ptr + c, ok, other=0.0)
    dscale, dshift = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for one in range(sets):
        at = one * channels + c
        dscale_n = tl.load(dscale_ptr + at, ok, other=0.0)
        dshift_n = tl.load(dshift_ptr + at, ok, other=0.0)
        tl.store(saliency_ptr + at, scale * dscale_n + shift * dshift_n, ok)
        dscale += dscale_n
        dshift += dshift_n
    slope, offset = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if TRAINING:
        share = -scale / tl.maximum(count, 1).to(tl.float32)
        slope, offset = share * invstd * invstd * dscale, share * dshift
    tl.store(vectors_ptr + c, invstd * dscale, ok)
    tl.store(vectors_ptr + channels + c, dshift, ok)
    tl.store(vectors_ptr + 2 * channels + c, slope, ok)
    tl.store(vectors_ptr + 3 * channels + c, offset, ok)


def norm_fold_bwd(
    dscale: Tensor,
    dshift: Tensor,
    scale: Tensor,
    shift: Tensor,
    invstd: Tensor,
    count: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `dcx_kernels.kernels.reference.norm_fold_bwd`."""
    if scale.dtype != torch.float32:
        return reference.norm_fold_bwd(dscale, dshift, scale, shift, invstd, count, training)
    operands = [t.contiguous() for t in (dscale, dshift, scale, shift, invstd)]
    channels, saliency = scale.shape[0], torch.empty_like(operands[0])
    vectors = scale.new_empty((4, channels))
    if channels:
        with on(scale):
            _norm_fold_bwd_kernel[(cdiv(channels, _BLOCK),)](
                *operands, vectors, saliency, channels,
                dscale.shape[0] if dscale.dim() == 2 else 1, count,
                TRAINING=training, BLOCK=_BLOCK,
            )  # fmt: skip
    dweight, dbias, slope, offset = vectors.unbind()
    return dweight, dbias, slope, offset, saliency

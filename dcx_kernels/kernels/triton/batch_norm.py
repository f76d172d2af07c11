"""Batch norm (+ ReLU): one pass for the statistics, one that normalises; backward one that sums
for both vectors and the saliency, and one that differentiates.

Backward does not read the output: its sign is recomputed from x, which both passes read anyway.
Where h is exactly 0 the gradient is 0, as in torch.

Legend: N batch, K channels (``k`` active), T tiles.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton._launch import cdiv, kernel, on
from dcx_kernels.kernels.triton._math import add
from dcx_kernels.kernels.triton._walk import walk
from dcx_kernels.kernels.triton.moments import finish_statistics, moments, sum_partials
from dcx_kernels.kernels.triton.norm_act import launch_norm_act, launch_norm_grad, norm_partials

__all__ = ["channel_batch_norm_bwd", "channel_batch_norm_fwd"]


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
        x: fp16, bf16 or fp32; the reference serves float64.
        weight, bias: compact (k,).
        running_mean, running_var: full (K,), read and written at ``active`` only.
        active: index list (k,), or None when all channels are active.

    Returns:
        y, and the mean and inverse standard deviation used, (k,) float32 each.
    """
    if x.dtype == torch.float64:
        return reference.channel_batch_norm_fwd(
            x, weight, bias, running_mean, running_var, active, training, momentum, eps, relu
        )
    if training and x.numel() == 0:  # an empty batch leaves the statistics alone, as in torch
        nothing = x.new_zeros(x.shape[1], dtype=torch.float32)
        return torch.empty_like(x), nothing, nothing.clone()
    if training:
        partial, rows, block = moments(x)
        mean, invstd = finish_statistics(
            partial, rows, block, running_mean, running_var, active, momentum, eps
        )
    else:
        assert running_mean is not None and running_var is not None
        mean, invstd = _running(running_mean, running_var, active, eps)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return launch_norm_act(x, invstd, mean, bias, weight, relu), mean, invstd


@kernel()
def _running_kernel(
    running_mean_ptr, running_var_ptr, active_ptr, mean_ptr, invstd_ptr, channels, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = c < channels
    place = c
    if active_ptr is not None:
        place = tl.load(active_ptr + c, exists, other=0)
    mean = tl.load(running_mean_ptr + place, exists, other=0.0).to(tl.float32)
    var = tl.load(running_var_ptr + place, exists, other=1.0).to(tl.float32)
    tl.store(mean_ptr + c, mean, exists)
    tl.store(invstd_ptr + c, 1.0 / tl.sqrt_rn(var + eps), exists)


def _running(
    running_mean: Tensor, running_var: Tensor, active: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of the active channels, (k,) float32 each."""
    channels = (running_mean if active is None else active).shape[0]
    mean = running_mean.new_empty(channels, dtype=torch.float32)
    invstd = torch.empty_like(mean)
    if channels:
        with on(mean):
            _running_kernel[(cdiv(channels, 128),)](
                running_mean, running_var, active, mean, invstd, channels, eps, BLOCK=128
            )
    return mean, invstd


@kernel()
def _finish_bwd_kernel(
    partial_ptr, weight_ptr, bias_ptr, invstd_ptr,
    dweight_ptr, dbias_ptr, saliency_ptr, scale_ptr, slope_ptr, offset_ptr,
    tiles, rows, channels,
    PER_SAMPLE: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)[:, None]
    exists = c < channels
    invstd = tl.load(invstd_ptr + c, exists, other=0.0)
    weight = tl.full((BLOCK_C,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, exists, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, exists, other=0.0).to(tl.float32)
    scale = invstd * weight  # as the forward pass has it, to the bit: the sign of h depends on it
    by_x = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = (first + t).to(tl.int64)
        inside = (tile < tiles) & exists[None, :]
        at = partial_ptr + tile * 2 * channels + c[None, :]
        by_x_t = tl.load(at, inside, other=0.0)
        total_t = tl.load(at + channels, inside, other=0.0)
        by_x += by_x_t
        total += total_t
        if PER_SAMPLE:
            saliency = by_x_t * scale[None, :] + total_t * bias[None, :]
            tl.store(saliency_ptr + tile * channels + c[None, :], saliency, inside)
    dbias = add(total, 0)
    dweight = add(by_x, 0) * invstd
    tl.store(dweight_ptr + c, dweight, exists)
    tl.store(dbias_ptr + c, dbias, exists)
    if not PER_SAMPLE:
        tl.store(saliency_ptr + c, weight * dweight + bias * dbias, exists)
    tl.store(scale_ptr + c, scale, exists)
    if TRAINING:
        share = scale / rows
        tl.store(slope_ptr + c, -share * invstd * dweight, exists)
        tl.store(offset_ptr + c, -share * dbias, exists)


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

    Args:
        y: the output if ReLU was fused, else None; its values are not read.
        per_sample: return the saliency of every sample, (N, k), instead of its sum, (k,).

    Returns:
        dx, dweight (k,), dbias (k,), and the signed sum of (dL/dh) h, h before the ReLU; float32
        but for dx.
    """
    if x.dtype == torch.float64:
        return reference.channel_batch_norm_bwd(
            dy, x, y, weight, bias, mean, invstd, training, eps, per_sample
        )
    batch, channels = x.shape[:2]
    vectors = torch.zeros if x.numel() == 0 else torch.empty
    dweight = vectors(channels, dtype=torch.float32, device=x.device)
    dbias = vectors(channels, dtype=torch.float32, device=x.device)
    shape = (batch, channels) if per_sample else (channels,)
    saliency = vectors(shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return torch.empty_like(x), dweight, dbias, saliency
    x, dy = walk(x, dy).tensors  # once: two passes read them
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    mean, invstd = mean.float(), invstd.float()  # of another backend they may be of x's dtype
    relu = y is not None
    partial = norm_partials(dy, x, invstd, mean, bias, weight, relu, per_sample)
    if per_sample:
        partial = sum_partials(partial)
    scale, slope, offset = dweight.new_empty((3, channels)).unbind(0)
    with on(x):
        _finish_bwd_kernel[(cdiv(channels, 16),)](
            partial, weight, bias, invstd, dweight, dbias, saliency, scale, slope, offset,
            batch if per_sample else partial.shape[1], x.numel() // channels, channels,
            PER_SAMPLE=per_sample, TRAINING=training, BLOCK_T=128, BLOCK_C=16,
        )  # fmt: skip
    if training:
        dx = launch_norm_grad(dy, x, scale, mean, bias, slope, offset, relu)
    else:
        dx = launch_norm_grad(dy, x, scale, mean, bias, None, None, relu)
    return dx, dweight, dbias, saliency

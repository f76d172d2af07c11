"""Batch norm of active channels, with optional ReLU; its backward emits the saliency.

Legend: N batch, K channels (``k`` active).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcx_kernels.channel_set import ChannelSet, agree
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.ops._library import register
from dcx_kernels.ops._vectors import check_vector, compact_vector

__all__ = ["ChannelBatchNormFunction", "channel_batch_norm"]


# --- raw operators --------------------------------------------------------------------------------


def _fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = backend.choose(x.device).channel_batch_norm_fwd(x, *args)
    return out


def _fwd_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _bwd(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor, Tensor]
    grads = backend.choose(dy.device).channel_batch_norm_bwd(dy, *args)
    return grads


def _bwd_fake(
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
    saliency = mean.new_empty((x.shape[0], x.shape[1]) if per_sample else (x.shape[1],))
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), saliency


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0  # as torch counts its own batch norm: multiply-accumulates of matrices only


channel_batch_norm_fwd = register(
    "channel_batch_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor? active, bool training, float momentum, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _no_flops,
)
channel_batch_norm_bwd = register(
    "channel_batch_norm_bwd(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor invstd, bool training, float eps, bool per_sample)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _no_flops,
)


# --- autograd -------------------------------------------------------------------------------------


class ChannelBatchNormFunction(torch.autograd.Function):
    """The gradient of ``probe``, (k,) or (N, k), is the signed sum of (dL/dh) h (DCE eq. 2)."""

    @staticmethod
    def forward(
        ctx: Any,
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
        probe: Tensor | None,
    ) -> Tensor:
        y: Tensor
        y, mean, invstd = channel_batch_norm_fwd(
            x, weight, bias, running_mean, running_var, active, training, momentum, eps, relu
        )
        ctx.save_for_backward(x, y if relu else None, weight, bias, mean, invstd)
        ctx.training, ctx.eps = training, eps
        ctx.has_probe, ctx.per_sample = probe is not None, probe is not None and probe.dim() == 2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        dx, dweight, dbias, saliency = channel_batch_norm_bwd(
            dy, x, y, weight, bias, mean, invstd, ctx.training, ctx.eps, ctx.per_sample
        )
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dweight, dbias, *(None,) * 7, saliency if ctx.has_probe else None


# --- the operator ---------------------------------------------------------------------------------


def channel_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    active: ChannelSet | None = None,
    relu: bool = False,
    probe: Tensor | None = None,
) -> Tensor:
    """Normalise compact channels; of the running statistics only the active entries move.

    Equivalent to: ``F.batch_norm`` of the active channels with the active entries of every vector,
        then ReLU.

    Args:
        x: compact input.
        running_mean, running_var: full statistics (K,), updated in place at active entries when
            training.
        weight, bias: compact (k,) - gradients are compact - or full (K,) - gradients are dense with
            zeros.
        training: use the statistics of the batch instead of the running ones.
        momentum, eps: as in `torch.nn.functional.batch_norm`.
        active: the channels x holds; None means all.
        relu: apply ReLU to the output.
        probe: zeros, (k,) or (N, k), whose gradient becomes the signed sum of (dL/dh) h over the
            batch and pixels, or over pixels, where h is the normalised output before ReLU.

    Raises:
        ValueError: on a channel count that disagrees, missing running statistics in evaluation, or
            a single value per channel in training.

    Shape:
        x (N, k, ...); out: the same.

    References:
        Saliency: Molchanov et al., https://arxiv.org/abs/1611.06440; DCE eq. 2, DCP eq. 7.
    """
    num_active = x.shape[1] if active is None else len(active)
    if x.dim() < 2 or not agree(x.shape[1], num_active):
        raise ValueError(expected(f"x with {num_active} channels", tuple(x.shape), "x"))
    if not training and (running_mean is None or running_var is None):
        raise ValueError(expected("running statistics in evaluation", "None"))
    if training and x.shape[0] * x.shape[2:].numel() == 1:
        what = "more than 1 value per channel when training"
        raise ValueError(expected(what, f"input size {tuple(x.shape)}"))
    size = num_active if active is None else active.num_channels
    check_vector("running_mean", running_mean, size)
    check_vector("running_var", running_var, size)
    check_vector("weight", weight, size, num_active)
    check_vector("bias", bias, size, num_active)
    idx = None if active is None or active.is_full else active.to(x.device).indices
    weight, bias = compact_vector(weight, idx), compact_vector(bias, idx)
    y: Tensor = ChannelBatchNormFunction.apply(
        x, weight, bias, running_mean, running_var, idx, training, momentum, eps, relu, probe
    )
    return y

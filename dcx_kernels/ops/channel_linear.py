"""Linear layer from the active input features to the active output features.

Legend: K out and C in channels (``k``, ``c`` active); each input channel has ``inner``
features (pixels).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcx_kernels.channel_set import ChannelSet, agree, known
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.ops._autocast import autocast
from dcx_kernels.ops._library import register
from dcx_kernels.ops.weights import unpack_weight

__all__ = ["ChannelLinearFunction", "channel_linear"]


# --- raw operators --------------------------------------------------------------------------------


def _fwd(x: Tensor, *args: Any) -> Tensor:
    y: Tensor = backend.choose(x.device).channel_linear_fwd(x, *args)
    return y


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    inner: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] if out_idx is None else out_idx.shape[0]))


def _dgrad(dy: Tensor, *args: Any) -> Tensor:
    dx: Tensor = backend.choose(dy.device).channel_linear_dgrad(dy, *args)
    return dx


def _dgrad_fake(
    dy: Tensor, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, inner: int
) -> Tensor:
    width = weight.shape[1] if in_idx is None else in_idx.shape[0] * inner
    return dy.new_empty((*dy.shape[:-1], width))


def _wgrad(dy: Tensor, x: Tensor) -> Tensor:
    dw: Tensor = backend.choose(dy.device).channel_linear_wgrad(dy, x)
    return dw


def _wgrad_fake(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((dy.shape[-1], x.shape[-1]))


def _fwd_flops(x: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * int(math.prod(x) * out_shape[-1])


def _dgrad_flops(dy: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * int(math.prod(dy) * out_shape[-1])


def _wgrad_flops(dy: Any, x: Any, **_: Any) -> int:
    return 2 * int(math.prod(dy) * x[-1])


channel_linear_fwd = register(
    "channel_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, Tensor? out_idx,"
    " int inner) -> Tensor",
    _fwd,
    _fwd_fake,
    _fwd_flops,
)
channel_linear_dgrad = register(
    "channel_linear_dgrad(Tensor dy, Tensor weight, Tensor? in_idx, Tensor? out_idx, int inner)"
    " -> Tensor",
    _dgrad,
    _dgrad_fake,
    _dgrad_flops,
)
channel_linear_wgrad = register(
    "channel_linear_wgrad(Tensor dy, Tensor x) -> Tensor", _wgrad, _wgrad_fake, _wgrad_flops
)


# --- autograd -------------------------------------------------------------------------------------


class ChannelLinearFunction(torch.autograd.Function):
    """Backward computes the active slice only; a full weight receives it scattered into zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_idx: Tensor | None,
        out_idx: Tensor | None,
        inner: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, in_idx, out_idx)
        ctx.inner, ctx.bias_size = inner, None if bias is None else bias.shape[0]
        y: Tensor = channel_linear_fwd(x, weight, bias, in_idx, out_idx, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, in_idx, out_idx = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            dx = channel_linear_dgrad(dy, weight, in_idx, out_idx, ctx.inner)
        if needs_weight:
            dw = channel_linear_wgrad(dy, x)
            if in_idx is not None or out_idx is not None:
                rows, width = weight.shape
                per_channel = dw.view(dw.shape[0], -1, ctx.inner)
                shape = [rows, width // ctx.inner, ctx.inner]
                dense = unpack_weight(per_channel, shape, out_idx, in_idx, 1, 1)
                dw = dense.view(rows, width)
        if needs_bias:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
            if out_idx is not None:
                db = db.new_zeros(ctx.bias_size).index_copy_(0, out_idx, db)
        return dx, dw, db, None, None, None


# --- the operator ---------------------------------------------------------------------------------


def channel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_active: ChannelSet | None = None,
    out_active: ChannelSet | None = None,
    inner: int = 1,
    packed: bool = False,
) -> Tensor:
    """Apply a linear layer to the features of the active channels.

    Equivalent to: ``F.linear(x * in_mask, weight, bias)[..., out_active.indices]``, for dense x.

    Args:
        x: compact or dense features; their number tells which.
        weight: full weight; its gradient is dense, zero outside the active slice.
        bias: full bias.
        in_active: active input channels; None means all.
        out_active: active output channels; None means all.
        inner: features per input channel (the pixels of a flattened feature map).
        packed: weight and bias are packed already, so that their gradients are compact.

    Raises:
        ValueError: on feature counts that disagree.

    Shape:
        x (..., c * inner) or (..., C * inner); weight (K, C * inner); bias (K,); out: (..., k).
    """
    if in_active is not None:
        x = _as_compact(x, in_active, inner)
    if not packed:
        _check_full_weight(x, weight, bias, in_active, out_active, inner)
    if packed and torch.compiler.is_compiling():  # which knows no length of a packed tensor
        out = weight.shape[0] if out_active is None else len(out_active)
        assert agree(weight.shape[0], out) and agree(weight.shape[1], x.shape[-1])
        assert bias is None or agree(bias.shape[0], out)
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    lists = (None, None) if packed else (_list(in_active, x), _list(out_active, x))
    y: Tensor = ChannelLinearFunction.apply(x, weight, bias, *lists, inner)
    return y


def _as_compact(x: Tensor, active: ChannelSet, inner: int) -> Tensor:
    if known(x.shape[-1] == len(active) * inner):
        return x
    if not known(x.shape[-1] == active.num_channels * inner):
        if torch.compiler.is_compiling():  # a length that only the run knows
            torch._check(x.shape[-1] == len(active) * inner)
            return x
        what = f"{active.num_channels * inner} (dense) or {len(active) * inner} (compact) features"
        raise ValueError(expected(what, x.shape[-1], "x"))
    channels: Tensor = x.unflatten(-1, (active.num_channels, inner))
    return channels.index_select(-2, active.to(x.device).indices).flatten(-2)


def _check_full_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ChannelSet | None,
    out_active: ChannelSet | None,
    inner: int,
) -> None:
    features = x.shape[-1] if in_active is None else in_active.num_channels * inner
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(expected(f"a (K, {features}) weight", tuple(weight.shape), "weight"))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(expected(f"{weight.shape[0]} values", tuple(bias.shape), "bias"))
    if out_active is not None and out_active.num_channels != weight.shape[0]:
        what = f"out_active of {weight.shape[0]} channels"
        raise ValueError(expected(what, out_active.num_channels, "weight"))


def _list(active: ChannelSet | None, like: Tensor) -> Tensor | None:
    return None if active is None or active.is_full else active.to(like.device).indices

"""Convolution in which every sample of a batch has active channels of its own.

Legend: N batch, K out and C in channels (``k``, ``c``: active in each sample), H W input,
P Q output, R S filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.kernels.layout import layout
from dcx_kernels.kernels.window import output_pixels
from dcx_kernels.ops._autocast import autocast
from dcx_kernels.ops._conv import pair
from dcx_kernels.ops._direct import direct
from dcx_kernels.ops._library import register

__all__ = ["SampleConv2dFunction", "sample_conv2d"]


# --- raw operators --------------------------------------------------------------------------------


def _fwd(x: Tensor, *args: Any) -> Tensor:
    y: Tensor = backend.choose(x.device).sample_conv2d_fwd(x, *args)
    return y


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    pixels = output_pixels(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    num_out = weight.shape[0] if out_idx is None else out_idx.shape[1]
    shape = (x.shape[0], num_out, *pixels)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _dgrad(dy: Tensor, *args: Any) -> Tensor:
    dx: Tensor = backend.choose(dy.device).sample_conv2d_dgrad(dy, *args)
    return dx


def _dgrad_fake(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _wgrad(dy: Tensor, *args: Any) -> Tensor:
    dw: Tensor = backend.choose(dy.device).sample_conv2d_wgrad(dy, *args)
    return dw


def _wgrad_fake(dy: Tensor, x: Tensor, weight_shape: Sequence[int], *args: Any) -> Tensor:
    return x.new_empty(list(weight_shape))


def _bias_grad(dy: Tensor, out_idx: Tensor | None, num_out: int) -> Tensor:
    db: Tensor = backend.choose(dy.device).sample_bias_grad(dy, out_idx, num_out)
    return db


def _bias_grad_fake(dy: Tensor, out_idx: Tensor | None, num_out: int) -> Tensor:
    return dy.new_empty(num_out)


def _fwd_flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * int(math.prod(out_shape)) * int(x[1]) * int(math.prod(weight[2:]))


def _dgrad_flops(dy: Any, x: Any, weight: Any, *args: Any, **_: Any) -> int:
    return 2 * int(math.prod(dy)) * int(x[1]) * int(math.prod(weight[2:]))


def _wgrad_flops(dy: Any, x: Any, weight_shape: Any, *args: Any, **_: Any) -> int:
    return 2 * int(math.prod(dy)) * int(x[1]) * int(math.prod(weight_shape[2:]))


_LISTS = "Tensor? in_idx, Tensor? out_idx"
_WINDOW = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
sample_conv2d_fwd = register(
    f"sample_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, {_LISTS}, {_WINDOW}) -> Tensor",
    _fwd,
    _fwd_fake,
    _fwd_flops,
)
sample_conv2d_dgrad = register(
    f"sample_conv2d_dgrad(Tensor dy, Tensor x, Tensor weight, {_LISTS}, {_WINDOW}) -> Tensor",
    _dgrad,
    _dgrad_fake,
    _dgrad_flops,
)
sample_conv2d_wgrad = register(
    f"sample_conv2d_wgrad(Tensor dy, Tensor x, SymInt[] weight_shape, {_LISTS}, {_WINDOW})"
    " -> Tensor",
    _wgrad,
    _wgrad_fake,
    _wgrad_flops,
)
sample_bias_grad = register(
    "sample_bias_grad(Tensor dy, Tensor? out_idx, SymInt num_out) -> Tensor",
    _bias_grad,
    _bias_grad_fake,
)


# --- autograd -------------------------------------------------------------------------------------


class SampleConv2dFunction(torch.autograd.Function):
    """Backward computes the active pairs of each sample; the weight receives their sum, dense."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_idx: Tensor | None,
        out_idx: Tensor | None,
        window: tuple[list[int], list[int], list[int]],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, in_idx, out_idx)
        ctx.window = window
        y: Tensor = sample_conv2d_fwd(x, weight, bias, in_idx, out_idx, *window)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *lists = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            dx = sample_conv2d_dgrad(dy, x, weight, *lists, *ctx.window)
        if needs_weight:
            dw = sample_conv2d_wgrad(dy, x, list(weight.shape), *lists, *ctx.window)
        if needs_bias:
            db = sample_bias_grad(dy, lists[1], weight.shape[0])
        return dx, dw, db, None, None, None


# --- the operator ---------------------------------------------------------------------------------


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
) -> Tensor:
    """Convolve the active channels of each sample, and nothing else.

    Equivalent to: ``F.conv2d`` of sample n with ``weight[out_idx[n]][:, in_idx[n]]``.

    Args:
        x: compact input; channel j of sample n is channel ``in_idx[n, j]``.
        weight: full filter; its gradient is dense, the sum over samples.
        bias: full bias.
        stride, padding, dilation: numbers, as in `torch.nn.functional.conv2d`.
        in_idx: active input channels of every sample, unique, int64; None: all, x is dense.
            A caller warrants that they are in range: nothing checks them on the way.
        out_idx: active output channels likewise.

    Raises:
        ValueError: on shapes that disagree.

    Shape:
        x (N, c, H, W); weight (K, C, R, S); bias (K,); in_idx (N, c); out_idx (N, k);
        out: (N, k, P, Q).

    References:
        Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019.
    """
    if x.dim() != 4 or weight.dim() != 4:
        got = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(expected("4-D x and weight", got))
    channels = weight.shape[1] if in_idx is None else x.shape[1]
    if x.shape[1] != channels:
        raise ValueError(expected(f"x with {channels} channels", tuple(x.shape), "x"))
    wanted = {"in_idx": (in_idx, (x.shape[0], x.shape[1])), "out_idx": (out_idx, (x.shape[0], -1))}
    for name, (idx, shape) in wanted.items():
        if idx is None:
            continue
        fits = idx.dim() == 2 and all(w in (-1, n) for n, w in zip(idx.shape, shape, strict=True))
        if not fits or idx.dtype != torch.int64:
            what = f"int64 of shape {tuple('k' if n < 0 else n for n in shape)}"
            raise ValueError(expected(what, f"{idx.dtype} of shape {tuple(idx.shape)}", name))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(expected(f"{weight.shape[0]} values", tuple(bias.shape), "bias"))
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    window = pair(stride), pair(padding), pair(dilation)
    if direct(x):
        return _fwd(x, weight, bias, in_idx, out_idx, *window)
    y: Tensor = SampleConv2dFunction.apply(x, weight, bias, in_idx, out_idx, window)
    return y

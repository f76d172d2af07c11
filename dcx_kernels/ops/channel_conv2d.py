"""Convolution of the active input channels into the active output channels.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.ops._autocast import autocast
from dcx_kernels.ops._conv import (
    as_compact,
    batch_saliency,
    count_macs,
    fake_output,
    groups_in,
    index_list,
    note_lengths,
    pair,
)
from dcx_kernels.ops._library import register
from dcx_kernels.ops.grouping import active_groups
from dcx_kernels.ops.weights import pack_weight, unpack_weight

__all__ = ["ChannelConv2dFunction", "channel_conv2d", "conv2d_padding"]


# --- raw operators --------------------------------------------------------------------------------


def _fwd(x: Tensor, *args: Any) -> Tensor:
    *args_, active = args
    kernels = backend.choose(x.device)
    y: Tensor = kernels.channel_conv2d_fwd(x, *args_, groups_in(active, x))
    return y


def _dgrad(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
    *args_, active = args
    kernels = backend.choose(dy.device)
    dx: Tensor = kernels.channel_conv2d_dgrad(dy, x, *args_, groups_in(active, x))
    return dx


def _dgrad_fake(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _wgrad(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
    *args_, active = args
    kernels = backend.choose(dy.device)
    dw: Tensor = kernels.channel_conv2d_wgrad(dy, x, *args_, groups_in(active, x))
    return dw.contiguous()  # as weights are, whatever the layout of x


def _wgrad_fake(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    active_groups: int,
) -> Tensor:
    return x.new_empty((dy.shape[1], x.shape[1] // groups_in(active_groups, x), *kernel_size))


def _fwd_flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * count_macs(out_shape, x[1], weight[2:], args[-1])


def _dgrad_flops(dy: Any, x: Any, weight: Any, *args: Any, **_: Any) -> int:
    return 2 * count_macs(dy, x[1], weight[2:], args[-1])


def _wgrad_flops(dy: Any, x: Any, kernel_size: Any, *args: Any, **_: Any) -> int:
    return 2 * count_macs(dy, x[1], kernel_size, args[-1])


_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
_LISTS = "Tensor? in_idx, Tensor? out_idx"
channel_conv2d_fwd = register(
    f"channel_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, {_LISTS}, {_GEOMETRY}, int groups,"
    " int active_groups) -> Tensor",
    _fwd,
    fake_output,
    _fwd_flops,
)
channel_conv2d_dgrad = register(
    f"channel_conv2d_dgrad(Tensor dy, Tensor x, Tensor weight, {_LISTS}, {_GEOMETRY}, int groups,"
    " int active_groups) -> Tensor",
    _dgrad,
    _dgrad_fake,
    _dgrad_flops,
)
channel_conv2d_wgrad = register(
    f"channel_conv2d_wgrad(Tensor dy, Tensor x, SymInt[2] kernel_size, {_GEOMETRY},"
    " int active_groups) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _wgrad_flops,
)


# --- autograd -------------------------------------------------------------------------------------


class ChannelConv2dFunction(torch.autograd.Function):
    """Backward computes the active slice only; a full weight receives it scattered into zeros.

    ``probe`` is a tensor of zeros, (k,) or (N, k), that nothing reads: its "gradient" is the signed
    saliency sum (dL/dy) y, per channel or per sample and channel. So saliency needs neither hooks
    nor an extra pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_idx: Tensor | None,
        out_idx: Tensor | None,
        geometry: tuple[list[int], list[int], list[int], int, int],
        probe: Tensor | None,
    ) -> Tensor:
        y: Tensor = channel_conv2d_fwd(x, weight, bias, in_idx, out_idx, *geometry)
        ctx.save_for_backward(x, weight, bias, in_idx, out_idx)
        ctx.geometry, ctx.has_probe = geometry, probe is not None
        ctx.per_sample = probe is not None and probe.dim() == 2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, in_idx, out_idx = ctx.saved_tensors
        lists = (in_idx, out_idx)
        *window, groups, active = ctx.geometry
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        per_batch = ctx.has_probe and not ctx.per_sample
        dx = dw = db = dprobe = None
        if needs_x:
            dx = channel_conv2d_dgrad(dy, x, weight, *lists, *ctx.geometry)
        if needs_weight or per_batch:
            dw = channel_conv2d_wgrad(dy, x, list(weight.shape[2:]), *window, active)
        if bias is not None and (needs_bias or per_batch):
            db = dy.sum((0, 2, 3))
        if per_batch:
            if in_idx is not None or out_idx is not None:
                weight_c = pack_weight(weight, out_idx, in_idx, groups, active)
            else:
                weight_c = weight
            bias_c = bias if bias is None or out_idx is None else bias[out_idx]
            assert dw is not None
            dprobe = batch_saliency(weight_c, dw, bias_c, db)
        elif ctx.has_probe:  # y again: what was saved may have been changed in place since
            y = channel_conv2d_fwd(x, weight, bias, *lists, *ctx.geometry)
            dprobe = (dy.to(torch.promote_types(dy.dtype, torch.float32)) * y).flatten(2).sum(2)
        if dw is not None and (in_idx is not None or out_idx is not None):
            dw = unpack_weight(dw, list(weight.shape), out_idx, in_idx, groups, active)
        if db is not None and out_idx is not None:
            db = torch.zeros_like(bias).index_copy_(0, out_idx, db)
        return dx, dw, db, None, None, None, dprobe


# --- the operator ---------------------------------------------------------------------------------


def channel_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    in_active: ChannelSet | None = None,
    out_active: ChannelSet | None = None,
    packed: bool = False,
    probe: Tensor | None = None,
    existing_groups: int | None = None,
) -> Tensor:
    """Convolve the active input channels into the active output channels, and nothing else.

    Equivalent to: ``F.conv2d(x * in_mask, weight, bias, ...)[:, out_active.indices]``, for dense x.

    Args:
        x: dense or compact input; its channel count tells which.
        weight: full filter; its gradient is dense, zero outside the active slice.
        bias: full bias.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, ``"same"`` and ``"valid"``
            included.
        groups: groups of the full convolution; depthwise when equal to its channels.
        in_active: active input channels; None means all.
        out_active: active output channels; None means all.
        packed: weight and bias are packed already, so that their gradients are compact
            (see `dcx_kernels.ops.slot`).
        probe: zeros, (k,) or (N, k), whose gradient becomes the signed sum of (dL/dy) y.
        existing_groups: what `active_groups` returns for these sets, or `ONE_EACH`, from a caller
            that has asked it; None: it is asked here.

    Returns:
        The compact output.

    Raises:
        ValueError: on channel counts that disagree, unequal active counts per group, or padding
            ``"same"`` with a stride.

    Shape:
        x (N, C, H, W) or (N, c, H, W); weight (K, C / groups, R, S); bias (K,); out: (N, k, P, Q).
    """
    if x.dim() == 3:
        batched = channel_conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, groups,
            in_active=in_active, out_active=out_active, packed=packed, probe=probe,
            existing_groups=existing_groups,
        )  # fmt: skip
        return batched.squeeze(0)
    if x.dim() != 4:
        raise ValueError(expected("x of shape (N, C, H, W) or (C, H, W)", tuple(x.shape), "x"))
    if in_active is not None:
        x = as_compact(x, in_active)
    if not packed:
        _check_full_weight(x, weight, bias, groups, in_active, out_active)
    active = existing_groups
    if active is None:
        active = active_groups(groups, in_active, out_active)
    if packed and torch.compiler.is_compiling():
        note_lengths(x, weight, bias, out_active, active)
    window = pair(stride), pair(dilation)
    x, pads = conv2d_padding(x, weight.shape[2:], window[0], padding, window[1])
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    lists = (None, None) if packed else (index_list(in_active, x), index_list(out_active, x))
    geometry = (window[0], pads, window[1], active if packed else groups, active)
    y: Tensor = ChannelConv2dFunction.apply(x, weight, bias, *lists, geometry, probe)
    return y


def conv2d_padding(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Resolve ``padding``; an uneven ``"same"`` pads x by the odd pixel at the end, as torch."""
    if not isinstance(padding, str):
        return x, pair(padding)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(expected("padding 'same', 'valid' or numbers", repr(padding)))
    if any(s != 1 for s in stride):
        raise ValueError(expected("stride 1 with padding='same'", tuple(stride)))
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [0, total[1] % 2, 0, total[0] % 2])
    return x, [t // 2 for t in total]


def _check_full_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    in_active: ChannelSet | None,
    out_active: ChannelSet | None,
) -> None:
    if weight.dim() != 4:
        raise ValueError(expected("a (K, C / groups, R, S) weight", tuple(weight.shape), "weight"))
    channels = x.shape[1] if in_active is None else in_active.num_channels
    if weight.shape[1] * groups != channels:
        what = f"a weight for {channels} input channels in {groups} groups"
        raise ValueError(expected(what, tuple(weight.shape), "weight"))
    if weight.shape[0] % groups:
        what = f"output channels in {groups} equal groups"
        raise ValueError(expected(what, weight.shape[0], "weight"))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(expected(f"{weight.shape[0]} values", tuple(bias.shape), "bias"))
    if out_active is not None and out_active.num_channels != weight.shape[0]:
        what = f"out_active of {weight.shape[0]} channels"
        raise ValueError(expected(what, out_active.num_channels, "weight"))

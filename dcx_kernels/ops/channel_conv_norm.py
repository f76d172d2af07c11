"""Convolution and the batch norm behind it, of active channels, with little between them stored.

The convolution takes the statistics of its output y as it writes it. Where convolutions alone read
what the norm and its ReLU make of y, that is never stored: they get y and the norm's vectors (a
`Norm`), and apply it as they load y. Their backward hands back dy, through ReLU and scale, and
the gradients of scale and shift; what comes through the statistics is added as dy is loaded.

Elsewhere z = max(h, 0) is stored; backward reduces dz once, and dy is made as dz is loaded.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet, agree
from dcx_kernels.errors import expected
from dcx_kernels.kernels.norm import Norm
from dcx_kernels.kernels.window import output_pixels
from dcx_kernels.ops._autocast import autocast
from dcx_kernels.ops._conv import as_compact, index_list, note_lengths, pair
from dcx_kernels.ops._vectors import check_vector, compact_vector
from dcx_kernels.ops.conv_norm_functions import (
    ConvNormActFunction,
    ConvNormFunction,
    NormActFunction,
    NormConvFunction,
)
from dcx_kernels.ops.grouping import active_groups

__all__ = ["BatchNorm", "Conv2d", "channel_conv_norm", "norm_act", "norm_conv2d"]


class Conv2d(NamedTuple):
    """A convolution's tensors and settings; see `channel_conv2d`."""

    weight: Tensor
    bias: Tensor | None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    in_active: ChannelSet | None = None
    out_active: ChannelSet | None = None
    packed: bool = False
    existing_groups: int | None = None
    probe: Tensor | None = None


class BatchNorm(NamedTuple):
    """A batch norm's tensors and settings; see `channel_batch_norm`."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    active: ChannelSet | None = None
    relu: bool = False
    probe: Tensor | None = None


def channel_conv_norm(
    x: Tensor, x_norm: Norm | None, conv: Conv2d, norm: BatchNorm, raw: bool = False
) -> tuple[Tensor, Norm | None]:
    """Convolve compact x, or max(h, 0) of it, and normalise the result.

    Equivalent to: `channel_batch_norm` of `channel_conv2d`, of `norm_act` of x if it has a norm.

    Args:
        x: compact, or dense without ``x_norm``.
        x_norm: the norm (followed by ReLU) that x has still to pass, as ``raw`` returned it.
        conv, norm: the layers; ``norm.active`` are the channels that ``conv`` computes.
        raw: return y before the norm, with the norm, instead of z; needs ``norm.relu``.

    Returns:
        y and its norm, or z and None.

    Raises:
        ValueError: as `channel_conv2d` and `channel_batch_norm`.

    Shape:
        x (N, c, H, W); y, z (N, k, P, Q); vectors of a norm: (k,), scale and shift (N, k) where
        ``norm.probe`` asks for the sums of each sample.
    """
    if raw and not norm.relu:
        raise ValueError(expected("a norm with ReLU to leave to the next convolution", "none"))
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(expected("running statistics in evaluation", "None"))
    arguments = _conv_arguments(x, x_norm, conv)
    x, geometry = arguments[0], arguments[-1]
    pixels = math.prod(output_pixels(x.shape[2:], conv.weight.shape[2:], *geometry[:3]))
    if norm.training and x.shape[0] * pixels == 1:
        what = "more than 1 value per channel when training"
        raise ValueError(expected(what, f"{x.shape[0]} sample of {pixels} pixel"))
    out = conv.weight.shape[0] if conv.out_active is None else len(conv.out_active)
    gamma, beta, active = _norm_vectors(norm, out, x)
    every = (
        *arguments, gamma, beta, norm.running_mean, norm.running_var, active,
        (norm.training, norm.momentum, norm.eps), norm.probe,
    )  # fmt: skip
    if not raw:
        return ConvNormActFunction.apply(*every, norm.relu), None
    y, *vectors = ConvNormFunction.apply(*every)
    return y, Norm(*vectors)


def norm_conv2d(x: Tensor, x_norm: Norm | None, conv: Conv2d) -> Tensor:
    """Convolve max(h, 0) of compact x: `channel_conv2d` of `norm_act`."""
    y: Tensor = NormConvFunction.apply(*_conv_arguments(x, x_norm, conv), conv.probe)
    return y


def norm_act(y: Tensor, norm: Norm) -> Tensor:
    """Return z = max((y - center) * scale + shift, 0), stored."""
    z: Tensor = NormActFunction.apply(y, *norm)
    return z


def _conv_arguments(x: Tensor, x_norm: Norm | None, conv: Conv2d) -> tuple[Any, ...]:
    """Return what every function begins with."""
    if x_norm is not None:
        count = x.shape[1] if conv.in_active is None else len(conv.in_active)
        if not (agree(x.shape[1], count) and agree(x_norm.center.shape[0], count)):
            raise ValueError(expected(f"compact x of {count} channels", tuple(x.shape), "x"))
    elif conv.in_active is not None:
        x = as_compact(x, conv.in_active)
    active = conv.existing_groups
    if active is None:
        active = active_groups(conv.groups, conv.in_active, conv.out_active)
    weight, bias = conv.weight, conv.bias
    if conv.packed and torch.compiler.is_compiling():
        note_lengths(x, weight, bias, conv.out_active, active)
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    lists = (None, None)
    if not conv.packed:
        lists = (index_list(conv.in_active, x), index_list(conv.out_active, x))  # type: ignore[assignment]
    window = pair(conv.stride), pair(conv.padding), pair(conv.dilation)
    geometry = (*window, active if conv.packed else conv.groups, active)
    return x, *(x_norm or (None, None, None)), weight, bias, *lists, geometry


def _norm_vectors(
    norm: BatchNorm, channels: int, x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return compact weight and bias, and the list of the channels that they are of."""
    active = norm.active
    if active is not None and not agree(channels, len(active)):
        raise ValueError(expected(f"{len(active)} channels", channels, "norm"))
    size = channels if active is None else active.num_channels
    check_vector("running_mean", norm.running_mean, size)
    check_vector("running_var", norm.running_var, size)
    check_vector("weight", norm.weight, size, channels)
    check_vector("bias", norm.bias, size, channels)
    idx = index_list(active, x)
    return compact_vector(norm.weight, idx), compact_vector(norm.bias, idx), idx

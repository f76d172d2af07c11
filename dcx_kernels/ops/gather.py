"""Gather and scatter of channels: between dense tensors and compact ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet, known
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.kernels.layout import layout
from dcx_kernels.ops._library import register

__all__ = [
    "GatherChannelsFunction",
    "ScatterChannelsFunction",
    "gather_channels",
    "scatter_channels",
]


def _gather(x: Tensor, active: Tensor, dim: int) -> Tensor:
    y: Tensor = backend.choose(x.device).gather(x, active, dim)
    return y


def _scatter(x: Tensor, active: Tensor, dim: int, size: int) -> Tensor:
    y: Tensor = backend.choose(x.device).scatter(x, active, dim, size)
    return y


def _gather_fake(x: Tensor, active: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = active.shape[0]
    kept = layout(x) if dim % x.dim() == 1 else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=kept)


def _scatter_fake(x: Tensor, active: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


gather = register(
    "channel_gather(Tensor x, Tensor active, int dim) -> Tensor", _gather, _gather_fake
)
scatter = register(
    "channel_scatter(Tensor x, Tensor active, int dim, SymInt size) -> Tensor",
    _scatter,
    _scatter_fake,
)


class GatherChannelsFunction(torch.autograd.Function):
    """Compact forward, zeros at inactive channels backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(active)
        ctx.dim, ctx.size = dim, x.shape[dim]
        y: Tensor = gather(x, active, dim)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (active,) = ctx.saved_tensors
        return ScatterChannelsFunction.apply(dy, active, ctx.dim, ctx.size), None, None


class ScatterChannelsFunction(torch.autograd.Function):
    """Zeros at inactive channels forward, compact backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, dim: int, size: int) -> Tensor:
        ctx.save_for_backward(active)
        ctx.dim = dim
        y: Tensor = scatter(x, active, dim, size)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (active,) = ctx.saved_tensors
        return GatherChannelsFunction.apply(dy, active, ctx.dim), None, None, None


def gather_channels(x: Tensor, active: ChannelSet, dim: int = 1) -> Tensor:
    """Copy the active channels of a dense tensor: compact along ``dim``.

    Args:
        x: dense, ``active.num_channels`` long along ``dim``; any dtype.
        active: the channels to keep.
        dim: the channel axis.

    Raises:
        ValueError: if x has another number of channels than the set.

    Shape:
        (N, C, ...) -> (N, len(active), ...) for dim = 1.
    """
    if not known(x.shape[dim] == active.num_channels):
        raise ValueError(
            expected(f"{active.num_channels} channels along dim {dim}", x.shape[dim], "x")
        )
    if active.is_full:
        return x
    y: Tensor = GatherChannelsFunction.apply(x, active.to(x.device).indices, dim)
    return y


def scatter_channels(x: Tensor, active: ChannelSet, dim: int = 1) -> Tensor:
    """Place compact channels into a dense tensor of zeros: the transpose of `gather_channels`.

    Args:
        x: compact, ``len(active)`` long along ``dim``; any dtype.
        active: where the channels belong.
        dim: the channel axis.

    Raises:
        ValueError: if x has another number of channels than the set has active ones.

    Shape:
        (N, len(active), ...) -> (N, C, ...) for dim = 1.
    """
    if not known(x.shape[dim] == len(active)):
        raise ValueError(
            expected(f"{len(active)} active channels along dim {dim}", x.shape[dim], "x")
        )
    if active.is_full:
        return x
    indices = active.to(x.device).indices
    y: Tensor = ScatterChannelsFunction.apply(x, indices, dim, active.num_channels)
    return y

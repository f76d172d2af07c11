"""A sparse convolution and the sparse norm behind it, computed as one where that pays."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcx_kernels._env import check_enabled, fuse_override
from dcx_kernels.channel_set import known
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.kernels.norm import Norm
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.nn._forward import Operands
from dcx_kernels.nn.conv import SparseChannelConv2d
from dcx_kernels.nn.norm import SparseChannelBatchNorm2d
from dcx_kernels.ops.channel_conv_norm import (
    BatchNorm,
    Conv2d,
    channel_conv_norm,
    norm_act,
    norm_conv2d,
)

__all__ = ["ConvNormUnit", "Unactivated", "fusable"]


class Unactivated(NamedTuple):
    """What a norm with ReLU makes of y, not computed: who reads it computes it as it loads y."""

    y: Tensor
    norm: Norm


def fusable(conv: SparseChannelConv2d) -> bool:
    """Tell whether a convolution can be fused with norms: its padding is zeros, by numbers."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class ConvNormUnit(nn.Module):
    """Calls a convolution, and a norm that reads nothing else: fused, or one after the other.

    The layers belong to the network: the unit has no parameters and no state of its own. Whether it
    fuses is decided call by call: where the backend that serves the input says that it pays, unless
    ``DCX_FUSE`` says otherwise; the result is the same.

    Args:
        conv: `fusable`.
        norm: reads what ``conv`` returns, if there is one.

    Shape:
        (N, c, H, W) -> (N, k, P, Q).
    """

    def __init__(self, conv: SparseChannelConv2d, norm: SparseChannelBatchNorm2d | None) -> None:
        super().__init__()
        self._layers = conv, norm  # in a tuple, so that nn.Module does not register them

    def extra_repr(self) -> str:
        """Name the layers."""
        return ", ".join(layer.layer_name for layer in self._layers if layer is not None)

    def forward(self, x: Tensor | Unactivated, raw: bool = False) -> Tensor | Unactivated:
        """Convolve and normalise.

        Args:
            x: compact; not computed where the unit before this one was asked for ``raw``.
            raw: leave norm and ReLU to the readers, which are such units all.
        """
        conv, norm = self._layers
        if isinstance(x, Unactivated):
            if not self._fuses(x.y):
                x = norm_act(*x)
            elif norm is None:
                return self._convolve(conv, x)
        if norm is None:
            return conv(x)  # type: ignore[no-any-return]
        if isinstance(x, Tensor) and not self._fuses(x):
            return norm(conv(x))  # type: ignore[no-any-return]
        return self._convolve_and_normalise(conv, norm, x, raw)

    def _fuses(self, x: Tensor) -> bool:
        """Decide for this call; also whether there is anything that only the layers would do."""
        conv, norm = self._layers
        if not _wanted(x.device) or x.dim() != 4 or x.shape[0] == 0:
            return False
        if conv.in_active is not None and known(x.shape[1] != len(conv.in_active)):
            return False
        sets = [active for active in (conv.in_active, conv.out_active) if active is not None]
        if any(known(len(active) == 0) for active in sets):
            return False
        if not (conv.compact_output or conv.out_active is None):
            return False
        measures = norm is not None and conv.saliency_reduction is not None
        return not measures and all(_is_plain(layer) for layer in self._layers)

    def _convolve(self, conv: SparseChannelConv2d, x: Unactivated) -> Tensor:
        conv._verify_tag(x.y)
        try:
            conv._check_channels(x.y)
            made = conv.operands(x.y)
            y = norm_conv2d(*x, _arguments(conv, made))
        except ValueError as error:
            raise ValueError(f"{conv.layer_name}: {error}") from None
        if made.probe is not None:
            made.probe.see(y)
        return conv._tag(y)

    def _convolve_and_normalise(
        self,
        conv: SparseChannelConv2d,
        norm: SparseChannelBatchNorm2d,
        x: Tensor | Unactivated,
        raw: bool,
    ) -> Tensor | Unactivated:
        tensor, before = x if isinstance(x, Unactivated) else (x, None)
        conv._verify_tag(tensor)
        _verify_sets(conv, norm)
        try:
            conv._check_channels(tensor)
            first = _arguments(conv, conv.operands(tensor))
        except ValueError as error:
            raise ValueError(f"{conv.layer_name}: {error}") from None
        made, statistics = norm.operands(tensor), norm.begin()
        weight, bias = (made.weight, made.bias) if made.packed else (norm.weight, norm.bias)
        second = BatchNorm(
            statistics.mean, statistics.var, weight, bias, statistics.of_batch,
            statistics.momentum, norm.eps, norm.out_active, norm.relu,
            None if made.probe is None else made.probe.tensor,
        )  # fmt: skip
        try:
            y, behind = channel_conv_norm(tensor, before, first, second, raw)
        except ValueError as error:
            raise ValueError(f"{norm.layer_name}: {error}") from None
        norm.end(statistics)
        if made.probe is not None:
            made.probe.see(y)
        y = norm._tag(y)
        return y if behind is None else Unactivated(y, behind)


def _arguments(conv: SparseChannelConv2d, made: Operands) -> Conv2d:
    weight, bias = (made.weight, made.bias) if made.packed else (conv.weight, conv.bias)
    assert weight is not None
    padding: Any = conv.padding
    return Conv2d(
        weight, bias, conv.stride, padding, conv.dilation, conv.groups, conv.in_active,
        conv.out_active, made.packed, made.groups,
        None if made.probe is None else made.probe.tensor,
    )  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _wanted(device: torch.device) -> bool:
    """Tell whether to fuse on a device; compiled code remembers the answer it was given first.

    A backend where recomputing costs less than storing says so with ``FUSES = True``.
    """
    forced = fuse_override()
    if forced is not None:
        return forced
    return bool(getattr(backend.choose(device), "FUSES", False))


def _is_plain(layer: ChannelLayer | None) -> bool:
    """Tell whether a layer does what its class does: nobody waits for its call."""
    if layer is None:
        return True
    hooks = (
        layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks,
        layer._backward_pre_hooks,
    )  # fmt: skip
    return not any(len(each) for each in hooks) and "forward" not in layer.__dict__


def _verify_sets(conv: SparseChannelConv2d, norm: SparseChannelBatchNorm2d) -> None:
    """Do for ``DCX_CHECK`` what the norm would do with the convolution's output."""
    if torch.compiler.is_compiling() or not check_enabled():
        return
    computed, read = conv.out_active, norm.in_active
    if computed is not None and read is not None and computed != read:
        raise ValueError(expected(f"x over {read}", f"x over {computed}", norm.layer_name))

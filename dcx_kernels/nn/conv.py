"""`torch.nn.Conv2d` that computes active channels only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet, known
from dcx_kernels.errors import expected
from dcx_kernels.nn._adopt import adopt
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.nn._forward import Operands
from dcx_kernels.ops.channel_conv2d import channel_conv2d
from dcx_kernels.ops.gather import scatter_channels
from dcx_kernels.ops.grouping import ONE_EACH, active_groups
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["SparseChannelConv2d"]


class SparseChannelConv2d(ChannelLayer, nn.Conv2d):
    """Drop-in `torch.nn.Conv2d`: same constructor, state_dict and repr; only active channels exist.

    Dense in, dense out with zeros at inactive channels, unless told otherwise: a compact input is
    recognised by its channel count, and ``compact_output`` keeps the output compact.

    Args:
        compact_output: return active channels only, (N, len(out_active), P, Q).

    The weight is kept contiguous whatever memory format the model is moved to: packing reads rows
    of it. The layout of activations follows the input, as in torch.

    Example:
        >>> conv = SparseChannelConv2d(64, 128, 3, padding=1)
        >>> conv.set_active(out=ChannelSet(range(0, 128, 2), 128))
        >>> conv(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 128, 8, 8])
    """

    _parameter_axes = {"weight": "out,in", "bias": "out"}  # noqa: RUF012

    def __init__(self, *args: Any, compact_output: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_channels()
        self.compact_output = compact_output

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, compact_output: bool = False) -> SparseChannelConv2d:
        """Make a sparse layer that shares the parameters of ``conv``.

        Raises:
            TypeError: if ``conv`` is not exactly an `nn.Conv2d` (or already sparse).
        """
        new = adopt(cls, conv, nn.Conv2d)
        new._init_channels()
        new.compact_output = compact_output
        new._keep_weight_contiguous()
        return new

    def set_active(
        self, out: ChannelSet | None = None, in_: ChannelSet | None = None
    ) -> SparseChannelConv2d:
        """Choose the channels of the next forward; None means all. Backward uses its forward's.

        Raises:
            ValueError: on a set of another size, or counts per group that disagree.
        """
        self._check_set(out, self.out_channels, "out")
        self._check_set(in_, self.in_channels, "in_")
        try:
            active_groups(self.groups, in_, out)
        except ValueError as error:
            raise ValueError(f"{self.layer_name}: {error}") from None
        self._set_sets(out, in_)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (N, C or c, H, W): (N, K, P, Q), or (N, k, P, Q) if ``compact_output``."""
        self._verify_tag(x)
        made = self.operands(x)
        probe = made.probe if x.dim() == 4 else None
        weight, bias = (made.weight, made.bias) if made.packed else (self.weight, self.bias)
        padding: Any = self.padding
        try:
            self._check_channels(x)
            if self.padding_mode != "zeros":
                x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                padding = 0
            assert weight is not None
            y = channel_conv2d(
                x, weight, bias, self.stride, padding, self.dilation, self.groups,
                in_active=self.in_active, out_active=self.out_active, packed=made.packed,
                probe=None if probe is None else probe.tensor, existing_groups=made.groups,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.layer_name}: {error}") from None
        if probe is not None:
            probe.see(y)
        if self.compact_output or self.out_active is None:
            return self._tag(y)
        return scatter_channels(y, self.out_active, dim=y.dim() - 3)

    def _check_channels(self, x: Tensor) -> None:
        channels, active = x.shape[x.dim() - 3] if x.dim() > 2 else None, self.in_active
        if known(channels == self.in_channels) or torch.compiler.is_compiling():
            return  # compiled, the operator checks
        if active is not None and channels == len(active):
            return
        what = f"{self.in_channels} (dense)"
        what += "" if active is None else f" or {len(active)} (compact)"
        raise ValueError(expected(f"{what} input channels", tuple(x.shape), "x"))

    def make_operands(self, x: Tensor) -> Operands:
        """See `ChannelLayer`; count the groups that exist, too."""
        made = super().make_operands(x)
        if self.groups == 1:
            return made
        groups = active_groups(self.groups, self.in_active, self.out_active)
        one_each = self.in_active is not None and self.in_active.num_channels == self.groups
        return made._replace(groups=ONE_EACH if one_each else groups)

    def _measured_channels(self) -> int:
        return self.out_channels

    def _new_slot(self, name: str, parameter: nn.Parameter) -> ParameterSlot:
        return ParameterSlot(parameter, self.groups if name == "weight" else 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseChannelConv2d:
        super()._apply(fn, recurse)
        self._keep_weight_contiguous()
        return self

    def _keep_weight_contiguous(self) -> None:
        if not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()

"""`torch.nn.PReLU` with a slope per channel, over active channels only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet, agree, known
from dcx_kernels.nn._adopt import adopt
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.ops._autocast import autocast

__all__ = ["SparseChannelPReLU"]


class SparseChannelPReLU(ChannelLayer, nn.PReLU):
    """`torch.nn.PReLU` of compact tensors.

    Shape:
        (N, len(active), ...) -> the same.
    """

    _parameter_axes = {"weight": "out"}  # noqa: RUF012

    def __init__(self, num_parameters: int = 1, init: float = 0.25) -> None:
        super().__init__(num_parameters, init)
        self._init_channels()

    @classmethod
    def from_dense(cls, prelu: nn.PReLU) -> SparseChannelPReLU:
        """Make a sparse layer that shares the slopes of ``prelu``.

        Raises:
            TypeError: if ``prelu`` is not exactly an `nn.PReLU` (or already sparse).
        """
        new = adopt(cls, prelu, nn.PReLU)
        new._init_channels()
        return new

    def set_active(self, active: ChannelSet | None) -> SparseChannelPReLU:
        """Choose the channels of the next forward; None means all.

        Raises:
            ValueError: on a set of another size.
        """
        self._check_set(active, self.num_parameters, "active")
        self._set_sets(active, active)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scale what is negative in compact x (N, k, ...)."""
        self._verify_tag(x)
        weight, active = self.operands(x).weight, self.out_active
        if weight is None:
            weight = self.weight
            if active is not None:
                weight = torch.index_select(weight, 0, active.to(weight.device).indices)
        if torch.compiler.is_compiling() and not known(weight.shape[0] == 1):
            return _slopes_of_any_number(x, weight)
        return self._tag(F.prelu(x, weight))


def _slopes_of_any_number(x: Tensor, weight: Tensor) -> Tensor:
    """Compute prelu by the formula torch.compile decomposes it to, without its question for 1."""
    assert agree(weight.shape[0], x.shape[1])
    x, weight = autocast(x, weight)  # type: ignore[assignment]
    return torch.where(x > 0, x, x * weight.view(-1, *[1] * (x.dim() - 2)))

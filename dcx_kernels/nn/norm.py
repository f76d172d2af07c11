"""`torch.nn.BatchNorm2d` over active channels only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.nn._adopt import adopt
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.ops.channel_batch_norm import channel_batch_norm

__all__ = ["SparseChannelBatchNorm2d"]


class SparseChannelBatchNorm2d(ChannelLayer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` of compact tensors; what belongs to inactive channels rests.

    Its backward measures the saliency of its channels where ``saliency_reduction`` asks for it.

    Args:
        relu: apply ReLU to the output, in the same operator.

    Shape:
        (N, len(active), H, W) -> the same.
    """

    _parameter_axes = {"weight": "out", "bias": "out"}  # noqa: RUF012

    def __init__(self, *args: Any, relu: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_channels()
        self.relu = relu

    @classmethod
    def from_dense(cls, norm: nn.BatchNorm2d, relu: bool = False) -> SparseChannelBatchNorm2d:
        """Make a sparse layer that shares parameters and buffers with ``norm``.

        Raises:
            TypeError: if ``norm`` is not exactly an `nn.BatchNorm2d` (or already sparse).
        """
        new = adopt(cls, norm, nn.BatchNorm2d)
        new._init_channels()
        new.relu = relu
        return new

    def set_active(self, active: ChannelSet | None) -> SparseChannelBatchNorm2d:
        """Choose the channels of the next forward; None means all.

        Raises:
            ValueError: on a set of another size.
        """
        self._check_set(active, self.num_features, "active")
        self._set_sets(active, active)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise compact x (N, k, H, W)."""
        if x.dim() != 4:
            raise ValueError(expected("a 4-D input", f"{x.dim()}-D", self.layer_name))
        self._verify_tag(x)
        _, weight, bias = self._operands()
        batch_statistics = self.training or self.running_mean is None
        tracked = self.track_running_stats or not self.training
        try:
            y = channel_batch_norm(
                x, self.running_mean if tracked else None, self.running_var if tracked else None,
                weight, bias,
                batch_statistics, self._momentum(), self.eps,
                active=self.out_active, relu=self.relu, probe=self._probe(x),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.layer_name}: {error}") from None
        return self._tag(y)

    def _momentum(self) -> float:
        """Count the batch; return the weight it has in the running statistics, as torch does."""
        if not (self.training and self.track_running_stats):
            return 0.0 if self.momentum is None else self.momentum
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # cumulative average
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum

    def _probe(self, x: Tensor) -> Tensor | None:
        if self.saliency_reduction is None or not (self.training and torch.is_grad_enabled()):
            return None
        pixels = x.shape[2] * x.shape[3]
        return self.saliency_meter.probe(x, x.shape[1], pixels, self.saliency_reduction)

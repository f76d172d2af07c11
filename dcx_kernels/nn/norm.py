"""`torch.nn.BatchNorm2d` over active channels only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.nn._adopt import adopt
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.ops.channel_batch_norm import channel_batch_norm

__all__ = ["SparseChannelBatchNorm2d", "Statistics"]


class Statistics(NamedTuple):
    """Running statistics of one forward: the norm's own, or (``averages``) the batch's alone.

    ``of_batch``: the batch is normalised by its own statistics.
    """

    of_batch: bool
    mean: Tensor | None
    var: Tensor | None
    momentum: float
    averages: bool


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
        made = self.operands(x)
        weight, bias = (made.weight, made.bias) if made.packed else (self.weight, self.bias)
        probe = None if made.probe is None else made.probe.tensor
        statistics = self.begin()
        mean, var = statistics.mean, statistics.var
        try:
            y = channel_batch_norm(
                x, mean, var, weight, bias, statistics.of_batch, statistics.momentum, self.eps,
                active=self.out_active, relu=self.relu, probe=probe,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.layer_name}: {error}") from None
        self.end(statistics)
        if made.probe is not None:
            made.probe.see(y)
        return self._tag(y)

    def begin(self) -> Statistics:
        """Count a batch; return what its forward reads and moves, and gives to `end` then."""
        tracked = self.track_running_stats or not self.training
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        momentum = 0.0 if self.momentum is None else self.momentum
        averages = self.training and self.track_running_stats and self.momentum is None
        if averages:
            assert mean is not None and var is not None
            mean, var, momentum = torch.zeros_like(mean), torch.zeros_like(var), 1.0
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        of_batch = self.training or self.running_mean is None
        return Statistics(of_batch, mean, var, momentum, averages)

    def end(self, statistics: Statistics) -> None:
        """Put the statistics of a batch where they belong, if they are not there."""
        if statistics.averages:
            self._average(statistics.mean, statistics.var)

    @torch.no_grad()
    def _average(self, *batch: Tensor | None) -> None:
        """Give the statistics of a batch the weight they have in the mean over all batches.

        The weight stays a tensor: as a number it would be a synchronisation, and a part of a graph.
        """
        assert self.num_batches_tracked is not None
        active = self.out_active
        for running, new in zip((self.running_mean, self.running_var), batch, strict=True):
            assert running is not None and new is not None
            weight = 1 / self.num_batches_tracked.to(running.dtype)
            moved = new * weight + running * (1 - weight)
            if active is None or active.is_full:
                running.copy_(moved)
            else:
                idx = active.to(running.device).indices
                running.index_copy_(0, idx, moved.index_select(0, idx))

    def _measured_channels(self) -> int:
        return self.num_features

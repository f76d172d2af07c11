"""The numbers of one network in the comparison table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph import ChannelModel, cost
from dcx_kernels.recipes.stages import Stage
from dcx_kernels.train.memory import saved_bytes
from dcx_kernels.train.modes import preserved

__all__ = ["ArmResult", "measure"]


@dataclass(frozen=True)
class ArmResult:
    """One row of the table.

    Args:
        arm: name of the network.
        accuracy: fraction of test images answered correctly.
        accuracy_as_trained: the same before batch-norm statistics were measured again.
        params: parameters that are computed with.
        macs: multiply-accumulates of one image's forward pass that are computed.
        activation_bytes: activations of one image that are computed.
        step_ms: median time of a training step; None if there was none.
        selecting_step_ms: the same while channels were selected; None if they never were.
        saved_bytes: kept between forward and backward of one batch.
        selecting_saved_bytes: the same with the channels of a step of the selection; None if there
            was none.
        steps: training steps.
    """

    arm: str
    accuracy: float
    accuracy_as_trained: float | None
    params: int
    macs: int
    activation_bytes: int
    step_ms: float | None
    selecting_step_ms: float | None
    saved_bytes: int
    selecting_saved_bytes: int | None
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


def measure(
    stage: Stage,
    images: Tensor,
    labels: Tensor,
    rows: Sequence[Mapping[str, Any]],
    selecting: range,
    first: Mapping[str, ChannelSet] | None = None,
    computed: nn.Module | None = None,
) -> ArmResult:
    """Measure a trained network.

    Args:
        stage: the network.
        images: one training batch.
        labels: its labels.
        rows: the log.
        selecting: epochs in which channels were selected, if the network has a choice.
        first: the channels of one of their steps, if they were.
        computed: the network whose costs count; a mask computes everything the dense one does.
    """
    model = stage.model if computed is None else computed
    price = cost(model) if isinstance(model, ChannelModel) else cost(model, images[:1])
    steps = [row for row in rows if row["arm"] == stage.arm and row["kind"] == "step"]
    changing = [row for row in steps if row["active"] and row["epoch"] in selecting]
    return ArmResult(
        arm=stage.arm,
        accuracy=stage.accuracy,
        accuracy_as_trained=stage.accuracy_as_trained,
        params=price.params,
        macs=price.macs,
        activation_bytes=price.activation_bytes,
        step_ms=_median_time(steps),
        selecting_step_ms=_median_time(changing),
        saved_bytes=_saved(stage.model, images, labels, {}),
        selecting_saved_bytes=_saved(stage.model, images, labels, first) if first else None,
        steps=len(steps),
    )


def _median_time(rows: Sequence[Mapping[str, Any]]) -> float | None:
    return median(row["step_ms"] for row in rows) if rows else None


def _saved(model: nn.Module, images: Tensor, labels: Tensor, sets: Mapping[str, ChannelSet]) -> int:
    buffers = [buffer.clone() for buffer in model.buffers()]
    with preserved(model):
        model.train()
        if isinstance(model, ChannelModel):
            model.set_active(sets)
        result = saved_bytes(lambda: F.cross_entropy(model(images), labels), model)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return result

"""The rows of the log: what one step and one epoch leave for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.train.evaluate import Evaluation
from dcx_kernels.train.position import Position

__all__ = ["WIDTH_SAMPLES", "epoch_row", "mean_scores", "step_row", "widths"]

WIDTH_SAMPLES = 200
"""How often the widths of all groups are logged in a run."""


def widths(sets: Mapping[str, ChannelSet]) -> dict[str, int]:
    """Return the number of active channels of each group."""
    return {name: len(channels) for name, channels in sets.items()}


def mean_scores(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean of each group's scores."""
    return {name: float(values.mean()) for name, values in scores.items()}


def _kept(sets: Mapping[str, ChannelSet]) -> dict[str, Any]:
    """Return the entries that say how much of each group is active, and out of what."""
    return {"widths": widths(sets), "channels": {n: s.num_channels for n, s in sets.items()}}


def step_row(
    position: Position,
    loss: float,
    step_ms: float,
    sets: Mapping[str, ChannelSet],
    total_steps: int,
) -> dict[str, Any]:
    """Return the row of a step that is counted in ``position`` already."""
    row: dict[str, Any] = {"kind": "step", "step": position.step, "epoch": position.epoch}
    row |= {"loss": loss, "active": sum(map(len, sets.values())), "step_ms": step_ms}
    if sets and position.step % max(1, total_steps // WIDTH_SAMPLES) == 0:
        row |= _kept(sets)
    return row


def epoch_row(
    position: Position,
    lr: float,
    sets: Mapping[str, ChannelSet] | None,
    evaluation: Evaluation | None,
    seconds: float,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the row of the epoch that ``position`` is at the end of.

    Args:
        position: where the run is.
        lr: the epoch's learning rate.
        sets: the selector's final channels, if there is one.
        evaluation: of these channels, if there was one.
        seconds: the epoch took.
        scores: what the selector ranks the channels of each group by, (num_channels,).
    """
    row: dict[str, Any] = {"kind": "epoch", "step": position.step, "epoch": position.epoch}
    row |= {"train_loss": position.loss, "train_accuracy": position.accuracy, "lr": lr}
    if sets is not None:
        row |= _kept(sets)
    if scores:
        row["scores"] = mean_scores(scores)
    if evaluation is not None:
        row |= {"test_loss": evaluation.loss, "test_accuracy": evaluation.accuracy}
    return row | {"seconds": seconds}

"""The rows of the log: what one step and one epoch leave for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.train.evaluate import Evaluation
from dcx_kernels.train.position import Position

__all__ = ["WIDTH_SAMPLES", "epoch_row", "step_row", "widths"]

WIDTH_SAMPLES = 200
"""How often the widths of all groups are logged in a run."""


def widths(sets: Mapping[str, ChannelSet]) -> dict[str, int]:
    """Return the number of active channels of each group."""
    return {name: len(channels) for name, channels in sets.items()}


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
        row["widths"] = widths(sets)
    return row


def epoch_row(
    position: Position,
    lr: float,
    sets: Mapping[str, ChannelSet] | None,
    evaluation: Evaluation | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the row of the epoch that ``position`` is at the end of."""
    row: dict[str, Any] = {"kind": "epoch", "step": position.step, "epoch": position.epoch}
    row |= {"train_loss": position.loss, "train_accuracy": position.accuracy, "lr": lr}
    if sets is not None:
        row["widths"] = widths(sets)
    if evaluation is not None:
        row |= {"test_loss": evaluation.loss, "test_accuracy": evaluation.accuracy}
    return row | {"seconds": seconds}

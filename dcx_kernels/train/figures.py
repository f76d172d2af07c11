"""The figures of a report, drawn without a display, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dcx_kernels.train.figures_canvas import COLOURS, finish, new_figure, png

__all__ = ["accuracy_curves", "cost_bars", "loss_curves"]


def accuracy_curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> bytes:
    """Draw test accuracy after each epoch, one curve per arm."""
    figure, (axes,) = new_figure(7.2, 3.6)
    for arm in arms:
        points = [r for r in _of(rows, arm, "epoch") if "test_accuracy" in r]
        x = [r["epoch"] + 1 for r in points]
        y = [100 * r["test_accuracy"] for r in points]
        axes.plot(x, y, marker="o", markersize=3, label=arm, color=COLOURS.get(arm))
    axes.set_xlabel("epoch (the thin network starts again at 1)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Test accuracy, running batch-norm statistics")
    finish(axes)
    return png(figure)


def loss_curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> bytes:
    """Draw the training loss of each step, smoothed over 2 % of the steps."""
    figure, (axes,) = new_figure(7.2, 3.6)
    for arm in arms:
        loss = np.array([r["loss"] for r in _of(rows, arm, "step")])
        if loss.size == 0:
            continue
        window = max(1, loss.size // 50)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        steps = np.arange(window, loss.size + 1)
        axes.plot(steps, smooth, label=arm, color=COLOURS.get(arm), linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.set_title("Training loss, moving average")
    finish(axes)
    return png(figure)


def cost_bars(arms: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw median step time and memory saved for backward, one bar per arm."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    _bars(left, arms, "step_ms", 1.0, "ms", "Median training step")
    _bars(right, arms, "saved_bytes", 2.0**20, "MiB", "Saved for backward")
    return png(figure)


def _bars(
    axes: Axes, arms: Sequence[Mapping[str, Any]], key: str, unit: float, label: str, title: str
) -> None:
    known = [arm for arm in arms if arm.get(key) is not None]
    values = [arm[key] / unit for arm in known]
    names = [arm["arm"] for arm in known]
    bars = axes.bar(names, values, color=[COLOURS.get(name, "#888888") for name in names])
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.margins(y=0.15)


def _of(rows: Sequence[Mapping[str, Any]], arm: str, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["arm"] == arm and row["kind"] == kind]

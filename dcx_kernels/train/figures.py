"""The figures of a report, drawn without a display, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["accuracy_curves", "channels_over_time", "cost_bars", "final_channels", "loss_curves"]

_COLOURS = {"sparse": "#c1440e", "mask": "#4a6fa5", "dense": "#555555", "thin": "#2e8b57"}
_DPI = 110


def accuracy_curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> bytes:
    """Draw test accuracy after each epoch, one curve per arm."""
    figure, axes = _figure(7.2, 3.6)
    for arm in arms:
        points = [r for r in _of(rows, arm, "epoch") if "test_accuracy" in r]
        x = [r["epoch"] + 1 for r in points]
        y = [100 * r["test_accuracy"] for r in points]
        axes.plot(x, y, marker="o", markersize=3, label=arm, color=_COLOURS.get(arm))
    axes.set_xlabel("epoch (the thin network starts again at 1)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Test accuracy, running batch-norm statistics")
    _finish(axes)
    return _png(figure)


def loss_curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> bytes:
    """Draw the training loss of each step, smoothed over 2 % of the steps."""
    figure, axes = _figure(7.2, 3.6)
    for arm in arms:
        loss = np.array([r["loss"] for r in _of(rows, arm, "step")])
        if loss.size == 0:
            continue
        window = max(1, loss.size // 50)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        steps = np.arange(window, loss.size + 1)
        axes.plot(steps, smooth, label=arm, color=_COLOURS.get(arm), linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.set_title("Training loss, moving average")
    _finish(axes)
    return _png(figure)


def channels_over_time(
    rows: Sequence[Mapping[str, Any]], arm: str, channels: Mapping[str, int]
) -> bytes:
    """Draw the active fraction of each group over the steps of an arm, as a heat map."""
    samples = [r for r in _of(rows, arm, "step") if "widths" in r]
    names = list(channels)
    figure, axes = _figure(7.2, 1.2 + 0.24 * max(4, len(names)))
    if samples:
        share = np.array([[r["widths"][n] / channels[n] for r in samples] for n in names])
        steps = [r["step"] for r in samples]
        extent = (steps[0], max(steps[-1], steps[0] + 1), len(names) - 0.5, -0.5)
        image = axes.imshow(
            share, aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=extent
        )
        figure.colorbar(image, ax=axes, label="active fraction")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("step")
    axes.set_title(f"Active channels per group while training ({arm})")
    return _png(figure)


def final_channels(final: Mapping[str, int], channels: Mapping[str, int]) -> bytes:
    """Draw how many channels of each group were kept, beside how many there are."""
    names = list(channels)
    figure, axes = _figure(7.2, 1.2 + 0.24 * max(4, len(names)))
    places = np.arange(len(names))
    axes.barh(places, [channels[n] for n in names], color="#dddddd", label="all")
    axes.barh(places, [final[n] for n in names], color=_COLOURS["sparse"], label="kept")
    for place, name in zip(places, names, strict=True):
        axes.text(
            channels[name], float(place), f" {final[name]}/{channels[name]}", va="center", size=7
        )
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("channels")
    axes.set_title("Channels per group in the final selection")
    _finish(axes)
    return _png(figure)


def cost_bars(arms: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw median step time and memory saved for backward, one bar per arm."""
    figure = Figure(figsize=(7.2, 3.2), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, arms, "step_ms", 1.0, "ms", "Median training step")
    _bars(right, arms, "saved_bytes", 2.0**20, "MiB", "Saved for backward")
    return _png(figure)


def _bars(
    axes: Axes, arms: Sequence[Mapping[str, Any]], key: str, unit: float, label: str, title: str
) -> None:
    known = [arm for arm in arms if arm.get(key) is not None]
    values = [arm[key] / unit for arm in known]
    names = [arm["arm"] for arm in known]
    bars = axes.bar(names, values, color=[_COLOURS.get(name, "#888888") for name in names])
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.margins(y=0.15)


def _of(rows: Sequence[Mapping[str, Any]], arm: str, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["arm"] == arm and row["kind"] == kind]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, figure.add_subplot()


def _finish(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()

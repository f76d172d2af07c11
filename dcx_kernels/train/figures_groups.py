"""Figures with a row for each channel group: what was active, what it was worth, what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from dcx_kernels.errors import expected
from dcx_kernels.train.figures_canvas import COLOURS, finish, new_figure, png

__all__ = [
    "channels_over_time",
    "final_channels",
    "group_history",
    "kept_over_epochs",
    "scores_over_epochs",
]


def group_history(
    values: npt.ArrayLike,
    names: Sequence[str],
    times: Sequence[float],
    *,
    title: str,
    label: str,
    time: str = "epoch",
    largest: float | None = None,
) -> Figure:
    """Draw a value of each group over time, as a heat map.

    Args:
        values: (groups, times) floating, not negative; NaN where there is none.
        names: of the groups, from the top.
        times: of the columns, even; nothing is drawn without one.
        title: of the figure.
        label: what the values are.
        time: what the times are.
        largest: end of the colour scale; the largest value if None.

    Raises:
        ValueError: if ``values`` has another shape.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(names), len(times)):
        raise ValueError(expected(f"values of shape {len(names), len(times)}", array.shape))
    figure, (axes,) = new_figure(7.2, 1.2 + 0.24 * max(4, len(names)))
    if array.size:
        half = 0.5 * (times[1] - times[0]) if len(times) > 1 else 0.5
        extent = (times[0] - half, times[-1] + half, len(names) - 0.5, -0.5)
        image = axes.imshow(
            array, aspect="auto", interpolation="nearest", vmin=0, vmax=largest, extent=extent
        )
        figure.colorbar(image, ax=axes, label=label)
    axes.set_yticks(range(len(names)), list(names), fontsize=7)
    axes.set_xlabel(time)
    axes.set_title(title)
    return figure


def channels_over_time(
    rows: Sequence[Mapping[str, Any]], arm: str, channels: Mapping[str, int]
) -> bytes:
    """Draw the active fraction of each group over the steps of an arm, as a heat map."""
    samples = [r for r in rows if (r["arm"], r["kind"]) == (arm, "step") and "widths" in r]
    figure = group_history(
        [[r["widths"][name] / size for r in samples] for name, size in channels.items()],
        list(channels),
        [r["step"] for r in samples],
        title=f"Active channels per group while training ({arm})",
        label="active fraction",
        time="step",
        largest=1,
    )
    return png(figure)


def kept_over_epochs(
    rows: Sequence[Mapping[str, Any]], arm: str, channels: Mapping[str, int]
) -> bytes:
    """Draw the fraction of each group that would be kept if selection ended after an epoch."""
    samples = [r for r in rows if (r["arm"], r["kind"]) == (arm, "epoch") and "widths" in r]
    figure = group_history(
        [[r["widths"][name] / size for r in samples] for name, size in channels.items()],
        list(channels),
        [r["epoch"] + 1 for r in samples],
        title=f"Kept channels per group if selection ended then ({arm})",
        label="kept fraction",
        largest=1,
    )
    return png(figure)


def scores_over_epochs(
    rows: Sequence[Mapping[str, Any]], arm: str, channels: Mapping[str, int]
) -> bytes | None:
    """Draw the mean score of each group's channels: CUCB's means, DCP's utilities.

    Returns:
        None if the arm's selector ranks channels by nothing.
    """
    samples = [r for r in rows if (r["arm"], r["kind"]) == (arm, "epoch") and "scores" in r]
    if not samples:
        return None
    figure = group_history(
        [[r["scores"].get(name, np.nan) for r in samples] for name in channels],
        list(channels),
        [r["epoch"] + 1 for r in samples],
        title=f"What the selector ranks channels by, mean of each group ({arm})",
        label="mean score",
    )
    return png(figure)


def final_channels(final: Mapping[str, int], channels: Mapping[str, int]) -> bytes:
    """Draw how many channels of each group were kept, beside how many there are."""
    names = list(channels)
    figure, (axes,) = new_figure(7.2, 1.2 + 0.24 * max(4, len(names)))
    places = np.arange(len(names))
    axes.barh(places, [channels[n] for n in names], color="#dddddd", label="all")
    axes.barh(places, [final[n] for n in names], color=COLOURS["sparse"], label="kept")
    for place, name in zip(places, names, strict=True):
        axes.text(
            channels[name], float(place), f" {final[name]}/{channels[name]}", va="center", size=7
        )
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("channels")
    axes.set_title("Channels per group in the final selection")
    finish(axes)
    return png(figure)

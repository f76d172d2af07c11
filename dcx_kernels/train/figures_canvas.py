"""What all figures share: a canvas without a display, colours, PNG bytes."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["COLOURS", "finish", "new_figure", "png"]

COLOURS = {"sparse": "#c1440e", "mask": "#4a6fa5", "dense": "#555555", "thin": "#2e8b57"}
_DPI = 110


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``width`` x ``height`` inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(np.asarray(grid).flat)


def finish(axes: Axes) -> None:
    """Add the grid, and a legend if there is something to say."""
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()

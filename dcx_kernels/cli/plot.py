"""A picture of a network's widths and costs, layer by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcx_kernels.errors import expected
from dcx_kernels.graph import Cost
from dcx_kernels.train.atomic import replace_file

__all__ = ["plot_widths"]

_FULL, _ACTIVE = "#dddddd", "#c1440e"
_FORMATS = ("png", "pdf", "svg")


def plot_widths(active: Cost, full: Cost, title: str, path: Path) -> None:
    """Draw output channels and MACs of every conv and linear layer, the active part in front.

    Args:
        active: cost of what is active.
        full: cost of the dense network; the same layers in the same order.
        title: above the picture.
        path: the file to create or replace; its suffix is the format.

    Raises:
        ValueError: on a suffix other than png, pdf or svg.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise ValueError(expected(f"--plot FILE in one of {_FORMATS}", repr(path.name)))
    rows = [p for p in zip(active.layers, full.layers, strict=True) if p[1].macs]
    names = [dense.name for _, dense in rows]
    figure = Figure(figsize=(10, 1.4 + 0.2 * max(4, len(rows))), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, [(a.out_active, f.out_active) for a, f in rows], "output channels", 1)
    _bars(right, [(a.macs, f.macs) for a, f in rows], "million MACs", 1e6)
    left.set_yticks(np.arange(len(rows)), names, fontsize=7)
    left.margins(y=0.01)
    left.invert_yaxis()
    left.legend(fontsize=8)
    figure.suptitle(title)
    replace_file(path, lambda temporary: figure.savefig(temporary, format=kind))


def _bars(axes: Axes, values: list[tuple[int, int]], label: str, unit: float) -> None:
    places = np.arange(len(values))
    axes.barh(places, [full / unit for _, full in values], color=_FULL, label="all")
    axes.barh(places, [part / unit for part, _ in values], color=_ACTIVE, label="active")
    axes.set_xlabel(label)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)

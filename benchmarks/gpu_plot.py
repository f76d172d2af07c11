"""Plots of a GPU run against density, drawn from its results files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.gpu_table import CONVS, geometric_mean
from benchmarks.rows import GpuOpRow, GpuStepRow, read_rows

__all__ = ["draw_ops", "draw_steps", "main"]

_COLOURS = {"own": "#c1440e", "library": "#8a6bbe", "mask": "#4a6fa5", "dense": "#555555"}
_STYLES = {"aligned": "-", "odd": "--"}
# (column of a row, label, target, stretch)
_STEPS = (
    ("sparse_over_thin", "sparse / thin step", 1.0, 0.8),
    ("mask_over_sparse", "mask / sparse step", None, None),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the plot of a results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_plot", description=__doc__)
    parser.add_argument("kind", choices=["ops", "steps"])
    parser.add_argument("csv", type=Path, help="what benchmarks.gpu_ops or gpu_step wrote")
    o = parser.parse_args(argv)
    print(draw_ops(o.csv) if o.kind == "ops" else draw_steps(o.csv))


def draw_ops(path: Path) -> Path:
    """Draw convolutions over cuDNN on the same compact tensors, one axes an operator."""
    rows = [row for row in read_rows(path, GpuOpRow) if row.op in CONVS]
    figure, grid = _figure(len(CONVS), 1)
    for axes, op in zip(grid[0], CONVS, strict=True):
        for arm in _COLOURS:
            for widths in _STYLES:
                points: dict[float, list[float]] = {}
                for row in rows:
                    here = row.widths in (widths, "full")
                    if row.op == op and row.arm == arm and here and row.over_torch is not None:
                        points.setdefault(row.density, []).append(row.over_torch)
                means = {d: geometric_mean(values) or 1.0 for d, values in points.items()}
                _line(axes, means, f"{arm}, {widths}", _COLOURS[arm], _STYLES[widths])
        axes.set_title(op, fontsize=9)
        axes.set_yscale("log")
        _finish(axes, "time / cuDNN on compact tensors (geo. mean)", 1.0, 1.25)
    return _save(figure, path, rows)


def draw_steps(path: Path) -> Path:
    """Draw the ratios of the training step, one column a network."""
    rows = [r for r in read_rows(path, GpuStepRow) if r.arm == "sparse" and r.regime == "fixed"]
    largest = {model: max(r.batch for r in rows if r.model == model) for model in _models(rows)}
    rows = [row for row in rows if row.batch == largest[row.model]]
    figure, grid = _figure(max(1, len(largest)), len(_STEPS))
    for column, model in enumerate(largest):
        for axes, (name, label, target, stretch) in zip(grid[:, column], _STEPS, strict=True):
            for widths, style in _STYLES.items():
                points = {
                    row.density: getattr(row, name)
                    for row in rows
                    if row.model == model
                    and row.widths in (widths, "full")
                    and getattr(row, name) is not None
                }
                _line(axes, points, widths, _COLOURS["own"], style)
            axes.set_title(f"{model}, batch {largest[model]}", fontsize=9)
            _finish(axes, label, target, stretch)
    return _save(figure, path, rows)


def _models(rows: Sequence[GpuStepRow]) -> list[str]:
    return list(dict.fromkeys(row.model for row in rows))


def _figure(columns: int, lines: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2 * columns, 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def _line(axes: Axes, points: dict[float, float], label: str, colour: str, style: str) -> None:
    if points:
        x, y = zip(*sorted(points.items()), strict=True)
        axes.plot(x, y, style, marker="o", markersize=3, color=colour, label=label)


def _finish(axes: Axes, label: str, target: float | None, stretch: float | None) -> None:
    for level, style in ((target, "--"), (stretch, ":")):
        if level is not None:
            axes.axhline(level, color="black", linewidth=0.8, linestyle=style)
    axes.set_ylabel(label)
    axes.set_xlabel("density (kept fraction of every layer)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _save(figure: Figure, path: Path, rows: Sequence[GpuOpRow | GpuStepRow]) -> Path:
    if rows:
        row = rows[0]
        what = f"{row.gpu}, {row.dtype} {row.layout}, torch {row.torch}, triton {row.triton}"
        title = f"{what}, dcx_kernels {row.dcx_kernels} ({row.commit}), {row.date}"
        figure.suptitle(title, fontsize=9)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


if __name__ == "__main__":
    main()

"""Step time and ratios against density, drawn from a results file."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.rows import StepRow, read_rows

__all__ = ["break_even", "draw", "main"]

_COLOURS = {"sparse": "#c1440e", "mask": "#4a6fa5", "dense": "#555555", "thin": "#2e8b57"}
_STYLES = {"any": "-", "fixed": "-", "varying": "--"}
# (ratio, its axis label, target and stretch at density 0.5)
_RATIOS = (
    ("sparse_over_thin", "sparse / thin", 1.20, 1.10),
    ("mask_over_sparse", "mask / sparse", 3.2, 3.6),
)

Points = list[tuple[float, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the plot of a results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, help="what benchmarks.train_step wrote")
    print(draw(parser.parse_args(argv).csv))


def draw(path: Path) -> Path:
    """Draw a column of axes per network and layout; return the PNG, next to the CSV file."""
    rows = read_rows(path, StepRow)
    columns = list(dict.fromkeys((row.model, row.layout) for row in rows))
    figure = Figure(figsize=(6.4 * max(1, len(columns)), 12), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, max(1, len(columns)), squeeze=False, sharex=True)
    for column, (model, layout) in enumerate(columns):
        of_layout = [row for row in rows if (row.model, row.layout) == (model, layout)]
        _draw_times(grid[0][column], of_layout)
        for axes, (name, label, target, stretch) in zip(grid[1:, column], _RATIOS, strict=True):
            _draw_ratio(axes, of_layout, name, label)
            for level, what, style in ((target, "target", "--"), (stretch, "stretch", ":")):
                text = f"{what} at d = 0.5: {level:g}"
                axes.axhline(level, color="black", linewidth=0.8, linestyle=style, label=text)
            axes.axhline(1.0, color="#aaaaaa", linewidth=0.8)
            axes.legend(fontsize=8)
        grid[2][column].set_xlabel("density (kept fraction of every layer)")
    if rows:
        figure.suptitle(_title(rows[0]), fontsize=9)
    target_path = path.with_suffix(".png")
    figure.savefig(target_path, dpi=110)
    return target_path


def break_even(ours: Points, theirs: Points) -> float | None:
    """Return the density where ours stops being faster, interpolated, or None.

    Args:
        ours: (density, ms) of the sparse arm.
        theirs: of the arm it is compared with, at the same densities.
    """
    other = dict(theirs)
    gains = [(density, other[density] - ms) for density, ms in sorted(ours) if density in other]
    for (low, gain), (high, loss) in itertools.pairwise(gains):
        if gain > 0 >= loss:
            return low + (high - low) * gain / (gain - loss)
    return None


def _draw_times(axes: Axes, rows: Sequence[StepRow]) -> None:
    series: dict[tuple[str, str], Points] = {}
    for row in rows:
        series.setdefault((row.arm, row.regime), []).append((row.density, row.step_ms))
    for (arm, regime), points in series.items():
        label = arm if regime == "any" else f"{arm}, {regime} widths"
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, _STYLES[regime], marker="o", markersize=3, color=_COLOURS[arm], label=label)
    named = []
    for arm in ("mask", "dense"):
        if ("sparse", "fixed") in series and (arm, "any") in series:
            ours, theirs = series["sparse", "fixed"], series[arm, "any"]
            at = break_even(ours, theirs)
            faster = min(ours)[1] < dict(theirs).get(min(ours)[0], 0.0)
            never = "none, always faster" if faster else "none"
            named.append(f"{arm}: " + (never if at is None else f"d = {at:.2f}"))
            if at is not None:
                axes.axvline(at, color=_COLOURS[arm], linewidth=0.8, linestyle=":")
    title = f"{rows[0].model} {rows[0].layout}"
    axes.set_title(f"{title}; break-even of sparse with {', '.join(named)}" if named else title)
    axes.title.set_fontsize(9)
    axes.set_ylabel("training step (ms, median)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_ratio(axes: Axes, rows: Sequence[StepRow], name: str, label: str) -> None:
    for regime in ("fixed", "varying"):
        points = [
            (row.density, getattr(row, name))
            for row in rows
            if row.arm == "sparse" and row.regime == regime and getattr(row, name) is not None
        ]
        if points:
            x, y = zip(*sorted(points), strict=True)
            style = _STYLES[regime]
            axes.plot(x, y, style, marker="o", markersize=3, color="#c1440e", label=regime)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _title(row: StepRow) -> str:
    return (
        f"batch {row.batch}, {row.dtype}, {row.cpu} ({row.threads} threads),"
        f" torch {row.torch}, dcx_kernels {row.dcx_kernels} ({row.commit}), {row.date}"
    )


if __name__ == "__main__":
    main()

"""The figures of a reproduced target: paper and ours in one picture, the title says how far."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from dcx_kernels.errors import expected
from dcx_kernels.recipes.reproduce import Reproduction
from dcx_kernels.recipes.reproduce_table import METRICS, cells_of, title_of
from dcx_kernels.recipes.reproduce_target import Entry, Target
from dcx_kernels.train.figures_canvas import finish, new_figure, png
from dcx_kernels.train.figures_gating import skipping_maps

__all__ = ["check_shown", "figures"]

_COLOURS = ("#c1440e", "#4a6fa5", "#2e8b57", "#555555", "#b8860b", "#7b4b94")
_AXIS = {"density": "active channels, %", "pruned": "MACs pruned, %", "macs": "MACs, 1e6"}


def check_shown(target: Target) -> None:
    """Refuse a study whose columns or figure nobody knows, before it is trained.

    Raises:
        ValueError: naming what is known.
    """
    wrong = [name for name in target.metrics if name not in METRICS]
    if wrong:
        raise ValueError(expected(f"metrics out of {', '.join(METRICS)}", wrong[0], target.name))
    if target.figure not in _KINDS:
        raise ValueError(expected(f"a figure of {', '.join(_KINDS)}", target.figure, target.name))


def figures(found: Reproduction) -> dict[str, bytes]:
    """Draw what there is: PNG by file name; nothing if there is no training yet."""
    if not found.rows:
        return {}
    return _KINDS[found.target.figure](found)


def _accuracy_over(x: str) -> Callable[[Reproduction], dict[str, bytes]]:
    def draw(found: Reproduction) -> dict[str, bytes]:
        pairs = list(dict.fromkeys((entry.data, entry.model) for entry in found.rows))
        columns = min(3, len(pairs))
        rows = -(-len(pairs) // columns)
        figure, all_axes = new_figure(max(7.2, 4.0 * columns), 3.4 * rows + 0.7, rows, columns)
        for axes, (data, model) in zip(all_axes, pairs, strict=False):
            for colour, variant in zip(_COLOURS, found.target.variants, strict=False):
                lines = [
                    entry
                    for entry in found.target.entries
                    if (entry.data, entry.model, entry.variant) == (data, model, variant)
                ]
                _curve(axes, found, lines, x, variant, colour)
            axes.set_xlabel(_AXIS[x])
            axes.set_ylabel("test accuracy, %")
            axes.set_title(f"{model} on {data}", fontsize=9)
            finish(axes)
        for axes in all_axes[len(pairs) :]:
            axes.set_visible(False)
        figure.suptitle(_wrapped(title_of(found)), fontsize=9)
        return {"figure.png": png(figure)}

    return draw


def _curve(
    axes: Axes, found: Reproduction, lines: list[Entry], x: str, variant: str, colour: str
) -> None:
    """Draw our means with their deviation, and the published points as open circles."""
    ours, theirs = [], []
    for entry in lines:
        cells = cells_of(found, entry)
        accuracy = cells["accuracy"]
        place: float | None = 100 * entry.density
        paper_place = place
        if x != "density":
            place, paper_place = cells[x].mean, cells[x].paper
        if accuracy.mean is not None and place is not None:
            ours.append((place, accuracy.mean, accuracy.deviation or 0.0))
        if accuracy.paper is not None and paper_place is not None:
            theirs.append((paper_place, accuracy.paper))
    if ours:
        places, means, deviations = np.array(sorted(ours)).T
        axes.plot(places, means, marker="o", markersize=3.5, color=colour, label=variant)
        axes.fill_between(places, means - deviations, means + deviations, color=colour, alpha=0.2)
    if theirs:
        places, means = np.array(theirs).T
        label = f"{variant}, paper"
        axes.scatter(places, means, 50, facecolors="none", edgecolors=colour, label=label)


def _over_time(found: Reproduction) -> dict[str, bytes]:
    """Draw the accuracy of every training over the seconds its steps took."""
    pairs = list(dict.fromkeys((entry.data, entry.model) for entry in found.rows))
    figure, all_axes = new_figure(7.2, 3.4 * len(pairs) + 0.7, len(pairs), 1)
    for axes, (data, model) in zip(all_axes, pairs, strict=True):
        lines = [entry for entry in found.rows if (entry.data, entry.model) == (data, model)]
        for number, entry in enumerate(lines):
            label = f"{entry.variant}, {entry.density:g}"
            for row in found.rows[entry]:
                seconds, accuracy = np.array([(0, np.nan), *row.get("curve", ())]).T
                colour = _COLOURS[number % len(_COLOURS)]
                axes.plot(seconds, 100 * accuracy, "o-", markersize=3, color=colour, label=label)
                label = ""  # once for all seeds
        if found.target.reach is not None:
            axes.axhline(found.target.reach, color="#999999", linewidth=1, linestyle=":")
        axes.set_xlabel("seconds of training steps")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(f"{model} on {data}", fontsize=9)
        finish(axes)
    figure.suptitle(_wrapped(title_of(found)), fontsize=9)
    return {"figure.png": png(figure)}


def _bars(metrics: tuple[str, ...]) -> Callable[[Reproduction], dict[str, bytes]]:
    def draw(found: Reproduction) -> dict[str, bytes]:
        lines = [entry for entry in found.target.entries if entry in found.rows]
        figure, all_axes = new_figure(
            7.2, len(metrics) * (0.5 + 0.42 * len(lines)) + 0.7, len(metrics), 1
        )
        for axes, name in zip(all_axes, metrics, strict=True):
            cells = [cells_of(found, entry)[name] for entry in lines]
            places = np.arange(len(lines))
            for shift, label, values, colour in (
                (-0.2, "paper", [cell.paper for cell in cells], "#bbbbbb"),
                (0.2, "ours", [cell.mean for cell in cells], _COLOURS[0]),
            ):
                known = {p + shift: v for p, v in zip(places, values, strict=True) if v is not None}
                if known:
                    at, long = list(known), list(known.values())
                    bars = axes.barh(at, long, 0.38, label=label, color=colour)
                    axes.bar_label(bars, fmt=" %.2f", fontsize=7)
            axes.set_yticks(places, [f"{e.model}, {e.variant}" for e in lines], fontsize=7)
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.set_xlabel(METRICS[name].label)
            finish(axes)
        figure.suptitle(_wrapped(title_of(found)), fontsize=9)
        return {"figure.png": png(figure)}

    return draw


def _channels(found: Reproduction, entry: Entry, name: str) -> dict[str, bytes]:
    """Draw the channels left in each layer, means over the seeds (figures 5 and 6 of DCP)."""
    rows = [row for row in found.rows.get(entry, []) if row.get("widths")]
    if not rows:
        return {}
    layers = list(rows[0]["widths"])
    kept = np.array([[row["widths"][layer] for layer in layers] for row in rows])
    figure, (axes,) = new_figure(7.2, 3.6)
    places = np.arange(len(layers))
    whole = [rows[0].get("channels", {}).get(layer, 0) for layer in layers]
    axes.bar(places, whole, color="#dddddd", label="all")
    error = kept.std(0, ddof=1) if len(rows) > 1 else None
    axes.bar(places, kept.mean(0), yerr=error, color=_COLOURS[0], label="left")
    axes.set_xticks(places, layers, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("channels")
    what = f"{entry.model}, {entry.variant}, density {entry.density:g}"
    axes.set_title(_wrapped(f"{title_of(found)}\n{what}"), fontsize=8)
    finish(axes)
    return {name: png(figure)}


def _dcp(found: Reproduction) -> dict[str, bytes]:
    drawn = _accuracy_over("pruned")(found)
    wanted = {("vgg16", 0.6): "channels-vgg16.png", ("resnet32", 0.5): "channels-resnet32.png"}
    for entry in found.rows:
        name = wanted.get((entry.model, entry.density))
        if name is not None:
            drawn |= _channels(found, entry, name)
    return drawn


def _fbs(found: Reproduction) -> dict[str, bytes]:
    drawn = _accuracy_over("macs")(found)
    rows = [row for entry, rows in found.rows.items() if entry.variant == "fbs" for row in rows]
    for row in rows:
        if "skipping" in row:  # of the first seed
            title = f"{_wrapped(title_of(found))}\nskipping at density {row['density']:g}"
            return {**drawn, "skipping.png": skipping_maps(row["skipping"], title=title)}
    return drawn


def _wrapped(title: str, width: int = 100) -> str:
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, width))


_KINDS: dict[str, Callable[[Reproduction], dict[str, bytes]]] = {
    "density": _accuracy_over("density"),
    "macs": _accuracy_over("pruned"),
    "bars": _bars(("accuracy",)),
    "dcp": _dcp,
    "fbs": _fbs,
    "layers": _bars(("accuracy", "macs")),
    "memory": _bars(("weight_mb", "activation_mb")),
    "time": _over_time,
}

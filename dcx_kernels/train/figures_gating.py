"""Figures of per-sample gating: which channels are skipped for which images.

References:
    Dynamic Channel Pruning: Feature Boosting and Suppression, https://arxiv.org/abs/1810.05331,
    figures 1c, 3b and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dcx_kernels.errors import expected
from dcx_kernels.train.figures_canvas import new_figure, png

__all__ = ["activation_maxima", "skipping_history", "skipping_maps", "skipping_order"]

Array = npt.NDArray[np.float64]


def skipping_order(probability: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return the channels in the order of the maps: those that are skipped most come first.

    Args:
        probability: (classes, channels), of skipping a channel when an image of a class is shown.
    """
    mean = np.asarray(probability, dtype=np.float64).mean(axis=0)
    return np.argsort(-mean, kind="stable").astype(np.int64)


def skipping_maps(
    probabilities: Mapping[str, npt.ArrayLike],
    classes: Sequence[str] | None = None,
    title: str = "",
) -> bytes:
    """Draw one heat map a layer: the probability of skipping each channel (x) for each class (y).

    The channels of each layer are sorted, see `skipping_order`; those that no class ever evaluates
    are hatched. (Figure 3b.)

    Args:
        probabilities: layer -> (classes, channels) in [0, 1].
        classes: their names; numbers if None.
        title: above all maps.

    Raises:
        ValueError: naming the layer whose array has another shape or range.
    """
    arrays = {name: _check(name, p, 2, classes) for name, p in probabilities.items()}
    if not arrays:
        raise ValueError(expected("at least one layer", "none"))
    columns = 1 if len(arrays) == 1 else 2
    rows = -(-len(arrays) // columns)
    figure, all_axes = new_figure(3.8 * columns + 0.8, 1.9 * rows + 0.4, rows, columns)
    for axes, (name, array) in zip(all_axes, arrays.items(), strict=False):
        image = _map(axes, array[:, skipping_order(array)], classes)
        axes.set_title(name, fontsize=9)
    for axes in all_axes[len(arrays) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=all_axes, label="probability of skipping")
    figure.supxlabel("channels, those skipped most on the left; hatched: never evaluated")
    if title:
        figure.suptitle(title, fontsize=9)
    return png(figure)


def skipping_history(
    history: npt.ArrayLike, epochs: Sequence[int], layer: str, classes: Sequence[str] | None = None
) -> bytes:
    """Draw one layer's heat map after each of some epochs, channels in the order of the first.

    (Figure 4.)

    Args:
        history: (epochs, classes, channels) in [0, 1].
        epochs: their numbers.
        layer: its name.
        classes: their names; numbers if None.

    Raises:
        ValueError: if shape or range are others.
    """
    array = _check(layer, history, 3, classes)
    if len(array) != len(epochs):
        raise ValueError(expected(f"maps of {len(epochs)} epochs", len(array), where=layer))
    columns = min(4, len(epochs))
    rows = -(-len(epochs) // columns)
    figure, all_axes = new_figure(2.2 * columns + 0.8, 1.5 * rows + 0.5, rows, columns)
    order = skipping_order(array[0])
    for axes, one, epoch in zip(all_axes, array, epochs, strict=False):
        image = _map(axes, one[:, order], None)
        axes.set_title(f"epoch {epoch}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in all_axes[len(epochs) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=all_axes, label="probability of skipping")
    named = f", {classes[0]} to {classes[-1]} from the top" if classes else ""
    figure.suptitle(f"{layer}: classes (y{named}) and channels (x)", fontsize=9)
    return png(figure)


def activation_maxima(maxima: npt.ArrayLike, layer: str, channels: int = 20) -> bytes:
    """Draw how the largest activation of a channel varies over images, a box for each channel.

    (Figure 1c.)

    Args:
        maxima: (images, channels), the largest activation in each channel's map.
        layer: its name.
        channels: how many are shown, the first ones.

    Raises:
        ValueError: if ``maxima`` has another shape, or is not finite.
    """
    array = np.asarray(maxima, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(expected("maxima of shape (images, channels)", array.shape, where=layer))
    if not np.isfinite(array).all():
        raise ValueError(expected("finite maxima", "others", where=layer))
    shown = array[:, :channels]
    figure, (axes,) = new_figure(7.2, 3.2)
    axes.boxplot(shown, whis=(1, 99), showfliers=False, widths=0.6)
    step = max(1, shown.shape[1] // 20)
    ticks = range(0, shown.shape[1], step)
    axes.set_xticks([tick + 1 for tick in ticks], [str(tick) for tick in ticks], fontsize=7)
    axes.set_xlabel("channel")
    axes.set_ylabel("largest activation")
    axes.set_title(f"{layer}: over {len(array)} images; boxes: quartiles, whiskers: 1 and 99 %")
    axes.grid(alpha=0.3, axis="y")
    return png(figure)


def _map(axes: Axes, array: Array, classes: Sequence[str] | None) -> Any:
    """Draw one map of sorted channels; return the image, for its colour bar."""
    image = axes.imshow(array, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="gray")
    for channel in np.flatnonzero((array == 1).all(axis=0)):
        place = (float(channel) - 0.5, -0.5)
        axes.add_patch(
            Rectangle(place, 1, len(array), hatch="////", fill=False, edgecolor="gray", linewidth=0)
        )
    if classes is not None:
        axes.set_yticks(range(len(classes)), list(classes), fontsize=5)
    return image


def _check(
    layer: str, probability: npt.ArrayLike, dims: int, classes: Sequence[str] | None
) -> Array:
    array = np.asarray(probability, dtype=np.float64)
    shape = ("epochs", "classes", "channels")[3 - dims :]
    if array.ndim != dims or not array.size:
        what = f"probabilities of shape ({', '.join(shape)})"
        raise ValueError(expected(what, array.shape, where=layer))
    if classes is not None and array.shape[-2] != len(classes):
        raise ValueError(expected(f"{len(classes)} classes", array.shape[-2], where=layer))
    if not ((array >= 0) & (array <= 1)).all():  # NaN neither
        got = f"{np.nanmin(array):g} to {np.nanmax(array):g}"
        if np.isnan(array).any():
            got = "NaN"
        raise ValueError(expected("probabilities in [0, 1]", got, where=layer))
    return array

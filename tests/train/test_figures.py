"""What the figures show, read back from their axes; that they are drawn at all, from the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dcx_kernels.train import figures_gating, figures_groups
from dcx_kernels.train.figures_gating import activation_maxima, skipping_history, skipping_maps


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are written as PNG."""
    found: list[Figure] = []

    def keep(figure: Figure, png: Callable[[Figure], bytes] = figures_groups.png) -> bytes:
        found.append(figure)
        return png(figure)

    monkeypatch.setattr(figures_groups, "png", keep)
    monkeypatch.setattr(figures_gating, "png", keep)
    return found


def maps(figure: Figure) -> list[np.ndarray[Any, Any]]:
    """Return the heat maps of a figure, without colour bars."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


ROWS: list[dict[str, Any]] = [
    {"arm": "mask", "kind": "epoch", "epoch": 0, "widths": {"a": 4, "b": 5}, "scores": {"a": 9}},
    {"arm": "sparse", "kind": "step", "step": 3, "widths": {"a": 3, "b": 1}},
    {"arm": "sparse", "kind": "step", "step": 4},
    {
        "arm": "sparse", "kind": "epoch", "epoch": 0,
        "widths": {"a": 1, "b": 5}, "scores": {"a": 0.5, "b": 0.25},
    },
    {
        "arm": "sparse", "kind": "epoch", "epoch": 1,
        "widths": {"a": 4, "b": 2}, "scores": {"a": 0.75, "b": 0.125},
    },
    {"arm": "sparse", "kind": "epoch", "epoch": 2, "widths": {"a": 4, "b": 1}},
]  # fmt: skip
CHANNELS = {"a": 4, "b": 5}


def test_group_figures_show_the_rows_of_their_arm(drawn: list[Figure]) -> None:
    assert figures_groups.channels_over_time(ROWS, "sparse", CHANNELS).startswith(b"\x89PNG")
    figures_groups.kept_over_epochs(ROWS, "sparse", CHANNELS)
    assert figures_groups.scores_over_epochs(ROWS, "sparse", CHANNELS) is not None
    active, kept, scores = (maps(figure)[0].tolist() for figure in drawn)
    assert active == [[0.75], [0.2]]
    assert kept == [[0.25, 1.0, 1.0], [1.0, 0.4, 0.2]]
    assert scores == [[0.5, 0.75], [0.25, 0.125]]
    assert drawn[1].axes[0].images[0].get_extent() == [0.5, 3.5, 1.5, -0.5]
    assert figures_groups.scores_over_epochs(ROWS[-1:], "sparse", CHANNELS) is None


def test_group_history_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"values of shape \(2, 3\), got \(3, 2\)"):
        figures_groups.group_history(np.zeros((3, 2)), ["a", "b"], [1, 2, 3], title="t", label="l")


def test_skipping_maps_sort_channels_and_hatch_the_unused(drawn: list[Figure]) -> None:
    """Means 0.2, 1, 0.5: the order is 1, 2, 0; channel 1 is never evaluated."""
    conv = np.array([[0.1, 1.0, 0.9], [0.3, 1.0, 0.1]])
    other = np.array([[1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])  # one class needs channel 0
    png = skipping_maps({"conv4": conv, "conv5": other, "conv6": other}, ["cat", "dog"])
    assert png.startswith(b"\x89PNG")
    shown = maps(drawn[0])
    assert shown[0].tolist() == [[1.0, 0.9, 0.1], [1.0, 0.1, 0.3]]
    assert shown[1].tolist() == other.tolist() and len(shown) == 3
    axes = drawn[0].axes
    assert [a.get_title() for a in axes[:3]] == ["conv4", "conv5", "conv6"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["cat", "dog"]
    hatched = [p for p in axes[0].patches if isinstance(p, Rectangle)]
    assert [p.get_x() for p in hatched] == [-0.5] and not axes[1].patches


def test_skipping_history_keeps_the_order_of_the_first_epoch(drawn: list[Figure]) -> None:
    first, second = [[0.0, 0.6, 0.2]], [[0.9, 0.1, 0.3]]
    skipping_history([first, second], [1, 5], "conv4")
    assert [m.tolist() for m in maps(drawn[0])] == [[[0.6, 0.2, 0.0]], [[0.1, 0.3, 0.9]]]
    assert [a.get_title() for a in drawn[0].axes[:2]] == ["epoch 1", "epoch 5"]


def test_activation_maxima_shows_quartiles_of_the_first_channels(drawn: list[Figure]) -> None:
    maxima = np.arange(5.0)[:, None] * np.arange(1, 31)  # channel c: 0, c, 2c, 3c, 4c
    activation_maxima(maxima, "layer3.1.conv2")
    axes = drawn[0].axes[0]
    medians = [line.get_ydata() for line in axes.lines if len(set(line.get_ydata())) == 1]
    heights = {float(np.asarray(y)[0]) for y in medians}
    assert {2.0 * channel for channel in range(1, 21)} <= heights  # the medians, 2 c
    assert len(axes.get_xticks()) == 20


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: skipping_maps({}), "expected at least one layer, got none"),
        (lambda: skipping_maps({"c": [0.5]}), r"c: .*shape \(classes, channels\), got \(1,\)"),
        (lambda: skipping_maps({"c": [[1.5, 0]]}), r"c: .*in \[0, 1\], got 0 to 1.5"),
        (lambda: skipping_maps({"c": [[np.nan, 0]]}), r"c: .*in \[0, 1\], got NaN"),
        (lambda: skipping_maps({"c": [[0.5]]}, ["x", "y"]), "c: expected 2 classes, got 1"),
        (lambda: skipping_history([[0.5]], [1], "c"), r"c: .*\(epochs, classes, channels\)"),
        (lambda: skipping_history([[[0.5]]], [1, 2], "c"), "c: expected maps of 2 epochs, got 1"),
        (lambda: activation_maxima([1.0], "c"), r"c: .*shape \(images, channels\), got \(1,\)"),
        (lambda: activation_maxima([[np.inf]], "c"), "c: expected finite maxima"),
    ],
)
def test_wrong_arrays_are_refused(draw: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()

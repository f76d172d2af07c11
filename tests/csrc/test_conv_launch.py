"""Launch arithmetic of csrc's convolutions: every pixel, tap and split exactly once."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import pytest

from dcx_kernels.kernels.window import output_pixels

_WINDOWS = [
    window
    for window in product([1, 2, 5, 8], [1, 2, 3], [1, 2, 3], [0, 1, 2], [1, 2, 3])
    if window[0] + 2 * window[3] > window[4] * (window[1] - 1)
]


def _met(axis: dict[str, int]) -> list[tuple[int, int, int]]:
    """List the (output pixel, source pixel, filter row) that a map lets meet."""
    found = []
    for i, tap in product(range(axis["size"]), range(axis["taps"])):
        source = i * axis["src_step"] + axis["src_first"] + tap * axis["tap_move"]
        if 0 <= source < axis["src_size"]:
            row = axis["tap_first"] + tap * axis["tap_step"]
            found.append((i * axis["out_step"] + axis["out_first"], source, row))
    return found


def _meant(window: tuple[int, ...]) -> set[tuple[int, int, int]]:
    """List the (y pixel, x pixel, filter row) of a convolution, by its definition."""
    size, taps, stride, padding, dilation = window
    (pixels,) = output_pixels([size], [taps], [stride], [padding], [dilation])
    meant = (
        (p, p * stride - padding + r * dilation, r) for p in range(pixels) for r in range(taps)
    )
    return {met for met in meant if 0 <= met[1] < size}


@pytest.mark.parametrize("window", _WINDOWS, ids=str)
def test_fwd_and_dgrad_meet_what_the_definition_says(
    built: ModuleType, window: tuple[int, ...]
) -> None:
    meant = _meant(window)
    fwd = _met(built.conv_fwd_axis(*window))
    assert sorted(fwd) == sorted(meant)
    dgrad = [met for axis in built.conv_dgrad_axes(*window) for met in _met(axis)]
    assert sorted((p, x, r) for x, p, r in dgrad) == sorted(meant)


@pytest.mark.parametrize("window", _WINDOWS[::7], ids=str)
def test_maps_of_dgrad_share_no_pixel(built: ModuleType, window: tuple[int, ...]) -> None:
    written = [
        i * axis["out_step"] + axis["out_first"]
        for axis in built.conv_dgrad_axes(*window)
        for i in range(axis["size"])
    ]
    assert len(set(written)) == len(written)
    assert set(written) <= set(range(window[0]))


def test_a_filter_larger_than_the_image_has_no_output(built: ModuleType) -> None:
    assert built.conv_output_pixels(2, 5, 1, 0, 1) == 0
    assert built.conv_output_pixels(2, 5, 2, 0, 1) == 0


@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        ((1, 1 << 20, 256, 132), 0),  # many pixels, wide
        ((1, 1 << 20, 136, 132), 1),  # 128 x 128 would be nearly half empty
        ((1, 1 << 20, 64, 132), 1),
        ((1, 64, 64, 132), 2),  # few pixels
        ((64, 784, 256, 132), 0),  # a set for each sample
    ],
)
def test_tiles(built: ModuleType, problem: tuple[int, ...], tile: int) -> None:
    assert built.conv_choose_tile(*problem) == tile


@pytest.mark.parametrize("pixels", [1, 31, 256, 257, 1000, 50176, 3211264])
@pytest.mark.parametrize("rows", [1, 64, 65, 512])
@pytest.mark.parametrize("columns", [9, 4608])
def test_splits_cover_every_pixel_once(
    built: ModuleType, pixels: int, rows: int, columns: int
) -> None:
    tile, splits, each = built.conv_choose_splits(pixels, rows, columns, 132)
    assert (splits - 1) * each < pixels <= splits * each
    assert each % 32 == 0
    assert splits == 1 or each >= 256
    assert tile == (0 if rows > 64 and columns > 64 else 2)
    assert splits <= 2 * 132

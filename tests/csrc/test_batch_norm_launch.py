"""Launch arithmetic of csrc's batch norm: every element and every partial result exactly once."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import pytest

_CHANNELS = [1, 3, 8, 17, 63, 64, 100, 257, 1030, 2051]


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("channels", _CHANNELS)
def test_rows_are_whole_vectors_and_blocks_fit(
    built: ModuleType, channels: int, vector: int
) -> None:
    for sets, span in [(1, 1), (1, 49), (1, 100352), (1, 1 << 24), (5, 49), (3000, 4)]:
        rows = built.norm_cover_rows(sets, span, channels, vector, 768)
        assert rows["columns"] == rows["times"] * channels >= 64
        assert rows["columns"] % vector == 0
        vectors = rows["columns"] // vector
        assert 1 <= rows["width"] * rows["rows"] <= 256
        assert (rows["across"] - 1) * rows["width"] < vectors <= rows["across"] * rows["width"]
        # threads without a vector, and without a place in the block, are few
        assert rows["across"] * rows["width"] - vectors < rows["across"]
        assert rows["width"] * (rows["rows"] + 1) > 256
        # tiles cover the span, from whole rows on
        assert (rows["tiles"] - 1) * rows["block"] < span <= rows["tiles"] * rows["block"]
        assert rows["block"] % (rows["times"] * rows["rows"]) == 0
        assert rows["blocks"] == sets * rows["tiles"] * rows["across"]
        assert rows["blocks"] <= max(768, sets * rows["across"])
        assert rows["leaves"] == (rows["times"] if rows["across"] > 1 else 1)


def test_large_tensors_fill_a_gpu_and_small_ones_do_not_spread_thin(built: ModuleType) -> None:
    assert built.norm_cover_rows(1, 1 << 22, 64, 8, 768)["blocks"] >= 700
    assert built.norm_cover_rows(1, 1000, 64, 8, 768)["blocks"] < 8
    assert built.norm_cover_planes(256, 64, 3136, 8, False)["blocks"] >= 700
    assert built.norm_cover_planes(1, 3, 512 * 512, 8, False)["blocks"] >= 96
    assert built.norm_cover_planes(8, 16, 64, 8, False)["blocks"] < 8


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("pixels", [2, 4, 49, 64, 3136, 12544, 262144])
def test_planes_are_covered_once(
    built: ModuleType, pixels: int, vector: int, per_sample: bool
) -> None:
    for samples, channels in [(1, 1), (1, 3), (2, 17), (32, 64), (1000, 63), (256, 2048)]:
        planes = built.norm_cover_planes(samples, channels, pixels, vector, per_sample)
        threads = planes["lanes"] * planes["together"] * planes["channels"]
        assert 1 <= threads <= 256
        assert (planes["across"] - 1) * planes["channels"] < channels
        assert planes["across"] * planes["channels"] >= channels
        assert (planes["sample_tiles"] - 1) * planes["samples"] < samples
        assert planes["sample_tiles"] * planes["samples"] >= samples
        assert (planes["pixel_tiles"] - 1) * planes["pixels"] < pixels
        assert planes["pixel_tiles"] * planes["pixels"] >= pixels
        assert planes["blocks"] == (
            planes["across"] * planes["sample_tiles"] * planes["pixel_tiles"]
        )
        if per_sample:
            assert planes["samples"] == planes["together"] == 1
        # lanes beyond a plane, and samples beyond the batch, would idle
        assert (planes["lanes"] - 1) * vector < pixels
        assert planes["together"] <= samples


def test_finishing_threads_have_every_number(built: ModuleType) -> None:
    for parts in (0, 1, 2, 7, 64, 4096):
        for numbers in (1, 63, 64, 5000):
            lanes, items, blocks = built.norm_cover_finish(parts, numbers)
            assert lanes * items == 256
            assert (blocks - 1) * items < numbers <= blocks * items
            assert lanes <= max(1, parts) and lanes in (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("channels", [3, 17, 64, 2051])
@pytest.mark.parametrize("begin", [0, 1, 5])
def test_columns_of_a_row_are_channels(built: ModuleType, channels: int, begin: int) -> None:
    """What kernels rely on: from an aligned origin on, channels repeat with the row."""
    rows = built.norm_cover_rows(1, 1000, channels, 8, 768)
    shift = begin * channels % 8
    of_channel = Counter((column + 16 * channels - shift) % channels
                         for column in range(rows["columns"]))  # fmt: skip
    assert of_channel == dict.fromkeys(range(channels), rows["times"])

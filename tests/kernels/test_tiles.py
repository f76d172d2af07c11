"""The table of tiles: total, bounded, monotone; the file that overrides it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcx_kernels.kernels import tiles
from dcx_kernels.kernels.tiles import DISTINCT, SHARED_LIMIT, Kind, Tile, conv_tile, wgrad_tile

KINDS: list[tuple[Kind, int]] = [("conv", 2), ("conv", 4), ("wgrad", 2), ("wgrad", 4)]
TILE = {"conv": conv_tile, "wgrad": wgrad_tile}
ROWS = [0, 1, 2, *(2**e + d for e in range(2, 26, 2) for d in (0, 1)), 2**40]
CHANNELS = [1, 2, 3, 15, 16, 17, 32, 33, 63, 64, 65, 100, 128, 129, 512, 1024, 5000]
by_kind = pytest.mark.parametrize(("kind", "itemsize"), KINDS, ids=lambda v: str(v))


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DCX_TILES", raising=False)
    monkeypatch.delenv("DCX_AUTOTUNE", raising=False)
    hooks = tiles._hooks[:]
    tiles.forget()
    yield
    tiles._hooks[:] = hooks
    tiles.forget()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that tiles are read from."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("DCX_TILES", str(path))
    return path


@by_kind
def test_every_size_has_a_tile_of_the_table_and_every_tile_is_used(
    kind: Kind, itemsize: int
) -> None:
    found = {TILE[kind](*sizes, itemsize) for sizes in itertools.product(ROWS, CHANNELS, CHANNELS)}
    assert found == set(DISTINCT[kind, itemsize])


@by_kind
def test_tiles_are_few_and_different(kind: Kind, itemsize: int) -> None:
    distinct = DISTINCT[kind, itemsize]
    assert len(set(distinct)) == len(distinct) <= 8


@by_kind
def test_tiles_fit_shared_memory_and_registers(kind: Kind, itemsize: int) -> None:
    for tile in DISTINCT[kind, itemsize]:
        operands = tile.rows + tile.out if kind == "conv" else tile.out + tile.inner
        depth = tile.inner if kind == "conv" else tile.rows
        assert tile.shared_bytes(kind, itemsize) == tile.stages * itemsize * depth * operands
        assert tile.shared_bytes(kind, itemsize) <= SHARED_LIMIT
        area = tile.out * (tile.rows if kind == "conv" else tile.inner)
        assert area / (32 * tile.warps) <= 128, tile
        assert all(n >= 16 and n & (n - 1) == 0 for n in tile[:3]), tile


@by_kind
def test_more_pixels_or_out_channels_never_get_a_smaller_tile(kind: Kind, itemsize: int) -> None:
    def area(rows: int, out: int, inner: int) -> int:
        tile = TILE[kind](rows, out, inner, itemsize)
        return tile.out * (tile.rows if kind == "conv" else tile.inner)

    for fixed, inner in itertools.product(CHANNELS, CHANNELS):
        by_rows = [area(rows, fixed, inner) for rows in ROWS]
        assert by_rows == sorted(by_rows), (fixed, inner)
    for rows, inner in itertools.product(ROWS, CHANNELS):
        by_out = [TILE[kind](rows, out, inner, itemsize).out for out in CHANNELS]
        assert kind == "conv" or by_out == sorted(by_out), (rows, inner)
    for rows, out in itertools.product(ROWS, CHANNELS):
        by_inner = [TILE[kind](rows, out, inner, itemsize).inner for inner in CHANNELS]
        if kind == "conv" and rows > 2**20:
            assert by_inner == sorted(by_inner), (rows, out)


def test_big_products_get_big_tiles_and_few_pixels_small_ones() -> None:
    assert conv_tile(1024 * 1024, 64, 64, 2)[:3] == (128, 64, 64)
    assert conv_tile(1024 * 64, 256, 256, 2)[:3] == (128, 128, 64)
    assert conv_tile(64 * 16, 512, 512, 2)[:3] == (64, 64, 64)
    assert conv_tile(49, 512, 512, 2)[:3] == (32, 32, 32)
    assert conv_tile(1024 * 1024, 64, 3, 2)[:3] == (128, 64, 16)
    assert conv_tile(1024 * 1024, 10, 512, 2).out == 16
    assert wgrad_tile(1024 * 64, 256, 256, 2)[:3] == (64, 128, 128)
    assert wgrad_tile(1024 * 1024, 64, 3, 2)[:3] == (64, 64, 16)


@pytest.mark.parametrize("size", [1, 16, 17, 64, 65, 1000, 2**30], ids=str)
def test_a_bucket_holds_the_sizes_up_to_a_power_of_two(size: int) -> None:
    found = tiles.bucket("conv", size, 64, 64, 2).rows
    assert found == min(max((size - 1).bit_length(), 4), 24)
    assert str(tiles.bucket("wgrad", 1000, 64, 65, 4)) == "wgrad/4/10/6/7"


@pytest.mark.parametrize("rows", [1, 100, 1000, 2**20])
@pytest.mark.parametrize("programs", [0, 1, 9, 100, 5000])
def test_splits_fill_the_gpu_but_leave_each_program_rows(rows: int, programs: int) -> None:
    tile = wgrad_tile(rows, 64, 64, 2)
    splits = tiles.wgrad_splits(rows, programs, tile, sms=132)
    assert splits == 1 or splits * programs <= 2 * 132
    assert splits == 1 or rows // splits >= 4 * tile.rows
    assert splits == max(1, min(rows // (4 * tile.rows), 2 * 132 // max(1, programs)))


def test_a_tile_that_does_more_is_smaller_or_has_more_warps() -> None:
    for (kind, itemsize), known in tiles.DISTINCT.items():
        for tile in known:
            assert tiles.fitted(kind, tile, itemsize) == tile, "the table fits as it is"
            for flags in range(1, 8):
                does = {name: bool(flags & bit) for name, bit in (("scalar", 1), ("pairs", 2))}
                fit = tiles.fitted(kind, tile, itemsize, **does, epilogue=bool(flags & 4))
                assert fit.shared_bytes(kind, itemsize, does["pairs"]) <= tiles.SHARED_LIMIT
                assert all(a <= b for a, b in zip(fit[:3], tile[:3], strict=True))
                assert fit.warps in (tile.warps, 8) and 2 <= fit.stages <= tile.stages
                if does["scalar"] and itemsize == 2:
                    assert fit.loaded(kind) <= 24 * 32 * fit.warps
                if does["pairs"]:
                    assert fit.accumulated(kind) <= 32 * 32 * fit.warps
    big = Tile(128, 128, 64, 8, 3)
    assert tiles.fitted("conv", big, 2, scalar=True) == Tile(128, 64, 32, 8, 3)
    assert tiles.fitted("conv", big, 2, pairs=True) == Tile(128, 64, 64, 8, 2)


def test_a_file_overrides_the_buckets_it_names(table: Path) -> None:
    wanted = Tile(32, 64, 16, 2, 5)
    table.write_text("{}")
    default = conv_tile(4096, 64, 64, 2)
    table.write_text(json.dumps({"conv/2/12/6/6": list(wanted)}))
    assert conv_tile(4096, 64, 64, 2) == default, "read once, lazily"
    tiles.forget()
    assert conv_tile(4096, 64, 64, 2) == conv_tile(2049, 33, 40, 2) == wanted
    assert conv_tile(4097, 64, 64, 2) != wanted
    assert conv_tile(4096, 64, 64, 4) != wanted
    assert wgrad_tile(4096, 64, 64, 2) != wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object, bucket: tile, got list"),
        ('{"conv/3/12/6/6": [64, 64, 32, 4, 4]}', "expected keys like"),
        ('{"conv/2/12/6": [64, 64, 32, 4, 4]}', "expected keys like"),
        ('{"conv/2/12/6/6": [64, 64, 32, 4]}', "'rows', 'out', 'inner', 'warps', 'stages'"),
        ('{"conv/2/12/6/6": [64, 64, 32, 4, 0]}', "'rows', 'out', 'inner', 'warps', 'stages'"),
        ('{"conv/2/12/6/6": [64, 64, 32.0, 4, 4]}', "'rows', 'out', 'inner', 'warps', 'stages'"),
        ('{"conv/2/12/6/6": "big"}', "'rows', 'out', 'inner', 'warps', 'stages'"),
        ('{"conv/2/12/6/6": [64, 48, 32, 4, 4]}', "powers of two from 16 on"),
        ('{"conv/2/12/6/6": [64, 64, 8, 4, 4]}', "powers of two from 16 on"),
        ('{"conv/2/12/6/6": [64, 64, 32, 3, 4]}', "warps"),
    ],
    ids=lambda v: v[:24],
)
def test_a_malformed_file_is_a_clear_error(table: Path, text: str, message: str) -> None:
    table.write_text(text)
    with pytest.raises(ValueError) as caught:
        conv_tile(4096, 64, 64, 2)
    assert message in str(caught.value) and str(table) in str(caught.value)


def test_a_file_that_is_not_there_is_an_error_only_where_it_was_named(
    table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected DCX_TILES to name a file"):
        conv_tile(4096, 64, 64, 2)
    monkeypatch.delenv("DCX_TILES")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiles.overrides("NVIDIA H100 80GB HBM3") == {}


def test_the_cache_has_one_file_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tiles.table_path("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / ".cache" / "dcx_kernels" / "tiles_NVIDIA_H100_80GB_HBM3.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"conv/2/12/6/6": [32, 32, 32, 4, 4]}')
    monkeypatch.setattr(tiles, "_gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    assert conv_tile(4096, 64, 64, 2) == (32, 32, 32, 4, 4)
    monkeypatch.setattr(tiles, "_gpu_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert conv_tile(4096, 64, 64, 2) != (32, 32, 32, 4, 4)


def test_a_forced_tile_is_used_everywhere_and_forgotten_after() -> None:
    before, wanted = conv_tile(4096, 64, 64, 2), Tile(16, 16, 16, 1, 1)
    with pytest.raises(RuntimeError, match="within"), tiles.forced(wanted) as asked:
        assert conv_tile(4096, 64, 64, 2) == wgrad_tile(1, 1, 1, 4) == wanted
        assert asked == [("conv", 2, 12, 6, 6), ("wgrad", 4, 4, 4, 4)]
        raise RuntimeError("within")
    assert conv_tile(4096, 64, 64, 2) == before


def test_the_hook_is_asked_once_a_bucket_and_only_when_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    wanted = Tile(16, 16, 16, 1, 1)
    tiles.on_first_use(lambda bucket: asked.append(bucket) or wanted)
    assert conv_tile(4096, 64, 64, 2) != wanted
    assert not asked
    tiles.forget()
    monkeypatch.setenv("DCX_AUTOTUNE", "1")
    assert conv_tile(4096, 64, 64, 2) == conv_tile(2049, 64, 64, 2) == wanted
    assert asked == [("conv", 2, 12, 6, 6)]


def test_a_hook_may_leave_it_to_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    default = conv_tile(4096, 64, 64, 2)
    tiles.forget()
    monkeypatch.setenv("DCX_AUTOTUNE", "1")
    tiles.on_first_use(lambda bucket: None)
    assert conv_tile(4096, 64, 64, 2) == default

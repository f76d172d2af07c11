"""The tuner: what it times, what it writes, when it runs. Timing itself is replaced by a table."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dcx_kernels.kernels import tiles
from dcx_kernels.kernels.tiles import DISTINCT, Bucket, Tile
from dcx_kernels.kernels.triton import tune

# tiny, since the interpreter runs one launch of each
LAYER = (2, 8, 20, 4, 4, 3, 1)
CALLS: list[tuple[Tile, Bucket]] = []


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file that is written."""
    path = tmp_path / "there" / "tiles.json"
    monkeypatch.setenv("DCX_TILES", str(path))
    monkeypatch.delenv("DCX_AUTOTUNE", raising=False)
    hooks = tiles._hooks[:]
    CALLS.clear()
    tiles.forget()
    yield path
    tiles._hooks[:] = hooks
    tiles.forget()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins for the passes, which only ask for a tile: forward 1, dgrad 2, wgrad 3 rows."""

    def passes(
        layer: tune.Layer, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[tiles.Kind, Callable[[], object]]]:
        rows, size = layer.N * layer.H * layer.W, dtype.itemsize
        yield "conv", lambda: tiles.conv_tile(rows, layer.K, layer.C, size)
        yield "conv", lambda: tiles.conv_tile(rows, layer.C, layer.K, size)
        yield "wgrad", lambda: tiles.wgrad_tile(rows, layer.K, layer.C, size)

    monkeypatch.setattr(tune, "_passes", passes)


def timer_that_prefers(*favourites: Tile) -> Callable[[Callable[[], object]], float]:
    """Return a timer that calls once, and finds these tiles the fastest, the first most of all."""

    def timer(call: Callable[[], object]) -> float:
        call()
        tile, asked = tiles._forced[0]
        CALLS.append((tile, asked[-1]))
        return 1.0 + favourites.index(tile) if tile in favourites else 100.0

    return timer


CONV, WGRAD = DISTINCT["conv", 2][3], DISTINCT["wgrad", 2][4]


def test_every_tile_is_timed_in_every_pass_and_the_fastest_is_written(
    launches: None, table: Path
) -> None:
    path = tune.tune([LAYER], device="cpu", timer=timer_that_prefers(CONV, WGRAD))
    assert path == table
    assert json.loads(table.read_text()) == {
        "conv/2/5/5/4": list(CONV),
        "conv/2/5/4/5": list(CONV),
        "wgrad/2/5/5/4": list(WGRAD),
    }
    for kind, times in (("conv", 2), ("wgrad", 1)):
        timed = [tile for tile, bucket in CALLS if bucket.kind == kind]
        assert sorted(timed) == sorted([*DISTINCT[kind, 2]] * times)
    assert tiles.conv_tile(32, 20, 8, 2) == CONV
    assert tiles.wgrad_tile(32, 20, 8, 2) == WGRAD


def test_layers_of_one_bucket_are_added_up(launches: None, table: Path) -> None:
    good, best = DISTINCT["conv", 2][:2]

    def timer(call: Callable[[], object]) -> float:
        call()
        tile = tiles._forced[0][0]
        first = len(CALLS) < len(DISTINCT["conv", 2])
        CALLS.append((tile, tiles._forced[0][1][-1]))
        if tile == good:
            return 20.0 if first else 1.0
        return 2.0 if tile == best else 50.0

    tune.tune([(1, 64, 64, 8, 8, 3, 1), (1, 64, 64, 7, 8, 3, 1)], device="cpu", timer=timer)
    assert json.loads(table.read_text())["conv/2/6/6/6"] == list(best)


def test_the_same_layer_is_timed_once(launches: None) -> None:
    tune.tune([LAYER, LAYER], device="cpu", timer=timer_that_prefers())
    assert len(CALLS) == 2 * len(DISTINCT["conv", 2]) + len(DISTINCT["wgrad", 2])


def test_a_tile_that_does_not_fit_is_passed_over(launches: None, table: Path) -> None:
    def timer(call: Callable[[], object]) -> float:
        call()
        if tiles._forced[0][0] != CONV:
            raise OutOfResources(200, 100, "shared memory")
        return 7.0

    tune.tune([LAYER], device="cpu", timer=timer)
    written = json.loads(table.read_text())
    assert written["conv/2/5/5/4"] == list(CONV)
    assert "wgrad/2/5/5/4" not in written


def test_other_buckets_of_the_file_stay(launches: None, table: Path) -> None:
    table.parent.mkdir()
    table.write_text('{"conv/2/20/9/9": [16, 16, 16, 1, 1], "conv/2/5/5/4": [16, 16, 16, 1, 1]}')
    tune.tune([LAYER], device="cpu", timer=timer_that_prefers(CONV))
    written = json.loads(table.read_text())
    assert written["conv/2/20/9/9"] == [16, 16, 16, 1, 1]
    assert written["conv/2/5/5/4"] == list(CONV)


def test_the_file_is_replaced_at_once(
    launches: None, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.tune([LAYER], device="cpu", timer=timer_that_prefers(CONV))
    before = table.read_text()

    def refuse(*_: object) -> None:
        assert table.read_text() == before
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        tune.tune([LAYER], device="cpu", timer=timer_that_prefers(DISTINCT["conv", 2][0]))
    assert table.read_text() == before
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_others_may_read_the_file(launches: None, table: Path) -> None:
    tune.tune([LAYER], device="cpu", timer=timer_that_prefers(CONV))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(table.stat().st_mode) == 0o666 & ~mask


def test_nothing_is_timed_by_default(launches: None, table: Path) -> None:
    table.parent.mkdir()
    table.write_text("{}")
    tune.install(timer_that_prefers(CONV), "cpu")
    tiles.conv_tile(32, 20, 8, 2)
    assert not CALLS
    assert table.read_text() == "{}"


def test_the_first_use_of_a_bucket_times_it_when_told(
    launches: None, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCX_AUTOTUNE", "1")
    tune.install(timer_that_prefers(CONV, WGRAD), "cpu")
    assert tiles.conv_tile(4096, 64, 128, 2) == tiles.conv_tile(2049, 33, 65, 2) == CONV
    assert {bucket for _, bucket in CALLS} == {Bucket("conv", 2, 12, 6, 7)}
    assert len(CALLS) == len(DISTINCT["conv", 2])
    assert tiles.wgrad_tile(4096, 64, 128, 2) == WGRAD
    assert set(json.loads(table.read_text())) == {"conv/2/12/6/7", "wgrad/2/12/6/7"}
    timed = len(CALLS)
    tiles.forget()
    assert tiles.conv_tile(4096, 64, 128, 2) == CONV
    assert len(CALLS) == timed, "the file knows it now"


@pytest.mark.parametrize(
    "bucket",
    [Bucket("conv", 2, r, o, i) for r in (4, 5, 12, 17) for o in (4, 9) for i in (4, 7)],
    ids=str,
)
def test_a_bucket_is_tried_with_a_layer_of_that_bucket(bucket: Bucket) -> None:
    layer = tune._layer_of(bucket)
    rows = layer.N * layer.H * layer.W
    assert tiles.bucket("conv", rows, layer.K, layer.C, 2) == bucket


def test_a_layer_for_a_huge_bucket_fits_into_memory() -> None:
    layer = tune._layer_of(Bucket("conv", 2, 24, 12, 12))
    assert layer.N >= 1
    assert layer.N * layer.H * layer.W * max(layer.C, layer.K) <= 1 << 27


def test_the_real_launchers_ask_for_tiles(table: Path, device: torch.device) -> None:
    path = tune.tune([LAYER], torch.float32, device=device, timer=timer_that_prefers())
    asked = set(json.loads(path.read_text()))
    assert {"conv/4/5/5/4", "conv/4/5/4/5", "wgrad/4/5/5/4"} == asked


@pytest.mark.parametrize(
    ("network", "macs"), [("vgg19", 0.2e9), ("resnet18", 0.7e9), ("resnet50", 1.2e9)]
)
def test_the_layers_of_networks(network: str, macs: float) -> None:
    found = tune.layers(network, 8, 1.0)
    assert len(set(found)) == len(found)
    total = sum(
        one.C * one.K * one.R**2 * (one.H // one.stride) * (one.W // one.stride) for one in found
    )
    assert macs < total < 4 * macs
    half = tune.layers(network, 8, 0.5)
    assert {one.C for one in half if one.C != 3} == {one.C // 2 for one in found if one.C != 3}


@pytest.mark.gpu
def test_time_on_a_gpu_is_positive() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    assert tune.milliseconds(lambda: x.add_(1)) > 0

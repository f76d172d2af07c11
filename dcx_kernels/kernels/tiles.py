"""Which tile a kernel computes at a time: a table over powers of two, so that widths may change.

The table rests on arithmetic, not on measurements, which no GPU has made yet: the operands of all
stages of a tile fit the 99 KB of shared memory that the smallest supported chip gives a block,
accumulators take at most 128 registers a thread, and a tile is made smaller before processors
stay idle. `dcx_kernels.kernels.triton.tune` measures, and writes a file that is asked first.

Legend: rows are pixels (N P Q), out the out channels (k), inner the in channels (c). A convolution
accumulates rows x out over inner, a gradient of a weight out x inner over rows.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from dcx_kernels._env import autotune_enabled, tiles_path
from dcx_kernels.errors import expected
from dcx_kernels.kernels.tile import SHARED_LIMIT, Kind, Tile, fitted

__all__ = [
    "DISTINCT",
    "SHARED_LIMIT",
    "Bucket",
    "Kind",
    "Tile",
    "bucket",
    "conv_tile",
    "fitted",
    "forced",
    "forget",
    "on_first_use",
    "overrides",
    "table_path",
    "wgrad_splits",
    "wgrad_tile",
]


class Bucket(NamedTuple):
    """What the table is asked for: sizes rounded up to powers of two, as exponents."""

    kind: Kind
    itemsize: int
    rows: int
    out: int
    inner: int

    def __str__(self) -> str:
        """Return the key in a file of tiles: "conv/2/20/6/6"."""
        return "/".join(map(str, self))


class _Table(NamedTuple):
    """Few tiles, and which of them compete for which sizes.

    Attributes:
        tiles: all of them; the offline tests compile each.
        rows: (out, inner) at most -> numbers of tiles, the largest first. The first row that holds
            is taken, in it the first tile that keeps a GPU busy, else the last.
    """

    tiles: tuple[Tile, ...]
    rows: dict[tuple[int, int], tuple[int, ...]]


_CONV_2 = _Table(
    tiles=(
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 32, 4, 4),
        Tile(128, 64, 16, 4, 4),
        Tile(64, 32, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(64, 16, 32, 4, 4),
    ),
    rows={
        (16, 64): (7,),
        (32, 64): (5, 6),
        (128, 16): (4, 5, 6),
        (128, 32): (3, 5, 6),
        (64, 64): (1, 2, 5, 6),
        (128, 64): (0, 1, 2, 5, 6),
    },
)
_CONV_4 = _Table(
    tiles=(
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(128, 64, 16, 4, 4),
        Tile(64, 32, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(64, 16, 32, 4, 4),
    ),
    rows={
        (16, 64): (6,),
        (32, 64): (4, 5),
        (128, 16): (3, 4, 5),
        (64, 64): (1, 2, 4, 5),
        (128, 64): (0, 1, 2, 4, 5),
    },
)
_WGRAD_2 = _Table(
    tiles=(
        Tile(64, 128, 128, 8, 3),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(64, 64, 16, 4, 4),
        Tile(64, 32, 32, 4, 4),
        Tile(64, 16, 32, 4, 4),
    ),
    rows={
        (16, 128): (6,),
        (32, 128): (5,),
        (128, 16): (4,),
        (128, 32): (3,),
        (64, 128): (2, 5),
        (128, 64): (1, 2, 5),
        (128, 128): (0, 1, 2, 5),
    },
)
_WGRAD_4 = _Table(
    tiles=tuple(tile._replace(rows=32) for tile in _WGRAD_2.tiles), rows=_WGRAD_2.rows
)
_TABLES: dict[tuple[Kind, int], _Table] = {
    ("conv", 2): _CONV_2,
    ("conv", 4): _CONV_4,
    ("wgrad", 2): _WGRAD_2,
    ("wgrad", 4): _WGRAD_4,
}

DISTINCT: dict[tuple[Kind, int], tuple[Tile, ...]] = {
    key: table.tiles for key, table in _TABLES.items()
}
"""All tiles of a kind and an item size in bytes."""

_STEPS = 4  # of the reduction, at least, before it is worth a program of its own


def conv_tile(rows: int, out: int, inner: int, itemsize: int) -> Tile:
    """Return the tile of a convolution's forward or dgrad pass.

    Args:
        rows: pixels of the result over all samples.
        out: channels of the result (of one group).
        inner: channels that are summed over (of one group), without the taps of the filter.
        itemsize: bytes of an element.
    """
    return _tile("conv", rows, out, inner, itemsize)


def wgrad_tile(rows: int, out: int, inner: int, itemsize: int) -> Tile:
    """Return the tile of the gradient of a weight: out x inner, over rows at a time.

    Args:
        rows: pixels of the output over all samples; they are summed over.
        out: k (of one group).
        inner: c (of one group), without the taps of the filter.
        itemsize: bytes of an element.
    """
    return _tile("wgrad", rows, out, inner, itemsize)


def wgrad_splits(rows: int, programs: int, tile: Tile, sms: int = 132) -> int:
    """Return among how many programs the rows are divided, whose sums are then added.

    Two programs for each processor, or fewer if a program had hardly any rows.

    Args:
        rows: pixels that are summed.
        programs: of an undivided sum.
        tile: from `wgrad_tile`.
        sms: processors of the GPU.
    """
    return max(1, min(2 * sms // max(1, programs), rows // (_STEPS * tile.rows)))


def bucket(kind: Kind, rows: int, out: int, inner: int, itemsize: int) -> Bucket:
    """Return what the table distinguishes: sizes rounded up to powers of two, within limits."""
    return Bucket(
        kind, itemsize, _log2(rows, _ROWS), _log2(out, _CHANNELS), _log2(inner, _CHANNELS)
    )


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[list[Bucket]]:
    """Within this context every kernel uses ``tile``: for tests and for the tuner.

    Yields:
        The buckets that kernels ask for in the meantime.
    """
    before = _forced[:]
    asked: list[Bucket] = []
    _forced[:] = [(tile, asked)]
    try:
        yield asked
    finally:
        _forced[:] = before


def on_first_use(hook: Callable[[Bucket], Tile | None]) -> None:
    """Have ``hook`` asked once for each bucket, under ``DCX_AUTOTUNE=1`` only.

    Args:
        hook: returns a tile, or None to leave it to the table.
    """
    _hooks[:] = [hook]


def forget() -> None:
    """Forget the files that were read and the tiles that were chosen."""
    _chosen.clear()
    overrides.cache_clear()


def table_path(gpu: str) -> Path:
    """Return the file of tiles of a GPU: ``DCX_TILES``, or one in the user's cache directory."""
    path = tiles_path()
    if path is not None:
        return Path(path)
    name = re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_")
    return Path.home() / ".cache" / "dcx_kernels" / f"tiles_{name}.json"


@functools.cache
def overrides(gpu: str) -> dict[str, Tile]:
    """Return the tiles in the file of a GPU, read once: ``{"conv/2/20/6/6": Tile(...)}``.

    The keys are `Bucket`s as text; tiles are lists of five numbers in the file.

    Raises:
        ValueError: if the file does not hold that, or ``DCX_TILES`` names no file.
    """
    path = table_path(gpu)
    if not path.exists():
        if tiles_path() is not None and not autotune_enabled():
            raise ValueError(expected("DCX_TILES to name a file", repr(str(path))))
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(expected("JSON", error, str(path))) from error
    if not isinstance(content, dict):
        raise ValueError(expected("an object, bucket: tile", type(content).__name__, str(path)))
    return {key: _parse(key, value, path) for key, value in content.items()}


_ROWS, _CHANNELS = range(4, 25), range(4, 13)  # exponents; tensor cores multiply 16 x 16 at least
_KEY = re.compile(r"(conv|wgrad)/[24]/\d+/\d+/\d+")
_NO_GPU = "none"
_BUSY = 128  # programs: a GPU has about as many processors

_chosen: dict[tuple[str, Bucket], Tile] = {}
_forced: list[tuple[Tile, list[Bucket]]] = []
_hooks: list[Callable[[Bucket], Tile | None]] = []


def _tile(kind: Kind, rows: int, out: int, inner: int, itemsize: int) -> Tile:
    asked = bucket(kind, rows, out, inner, itemsize)
    if _forced:
        tile, so_far = _forced[0]
        so_far.append(asked)
        return tile
    key = (_gpu_name(), asked)
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def _choose(gpu: str, asked: Bucket) -> Tile:
    tile = None
    if gpu != _NO_GPU or tiles_path() is not None:
        tile = overrides(gpu).get(str(asked))
    if tile is None and autotune_enabled() and _hooks:
        tile = _hooks[0](asked)
    return tile or _from_table(asked)


def _from_table(asked: Bucket) -> Tile:
    table = _TABLES[asked.kind, asked.itemsize]
    rows, out, inner = 1 << asked.rows, 1 << asked.out, 1 << asked.inner
    widest = list(table.rows)[-1]
    narrowed = min(out, widest[0]), min(inner, widest[1])
    numbers = next(
        tiles
        for limit, tiles in table.rows.items()
        if narrowed[0] <= limit[0] and narrowed[1] <= limit[1]
    )
    tiles = [table.tiles[number] for number in numbers]
    return next(
        (t for t in tiles if _programs(asked.kind, t, rows, out, inner) >= _BUSY), tiles[-1]
    )


def _programs(kind: Kind, tile: Tile, rows: int, out: int, inner: int) -> int:
    if kind == "conv":
        return _cdiv(rows, tile.rows) * _cdiv(out, tile.out)
    blocks = _cdiv(out, tile.out) * _cdiv(inner, tile.inner)
    return blocks * max(1, rows // (_STEPS * tile.rows))


def _parse(key: str, value: object, path: Path) -> Tile:
    if not _KEY.fullmatch(key):
        raise ValueError(expected('keys like "conv/2/20/6/6"', repr(key), str(path)))
    numbers = value if isinstance(value, list) else []
    if len(numbers) != len(Tile._fields) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(expected(f"{key}: {list(Tile._fields)}", repr(value), str(path)))
    tile = Tile(*numbers)
    if any(n < 16 or n & (n - 1) for n in tile[:3]):
        raise ValueError(expected(f"{key}: powers of two from 16 on", repr(value), str(path)))
    if tile.warps not in (1, 2, 4, 8, 16):
        raise ValueError(expected(f"{key}: 1, 2, 4, 8 or 16 warps", repr(value), str(path)))
    return tile


def _gpu_name() -> str:
    # a process that never touched a GPU must not start one here
    return _name_of(torch.cuda.current_device()) if torch.cuda.is_initialized() else _NO_GPU


@functools.cache
def _name_of(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _log2(size: int, within: range) -> int:
    return min(max((size - 1).bit_length(), within[0]), within[-1])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

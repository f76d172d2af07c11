"""Time tiles on the GPU that is there, and write down which are the fastest.

Nothing here runs by default. `tune` times the layers it is given; with ``DCX_AUTOTUNE=1`` every
bucket that no file knows is timed when it is first met. Both write the file that
`dcx_kernels.kernels.tiles` reads:

    python -m dcx_kernels.kernels.triton.tune --network resnet50 --batch 256 --density 0.5

Legend: N batch, K out and C in channels, H W input, R filter size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from dcx_kernels.kernels import tiles
from dcx_kernels.kernels.tiles import Bucket, Kind, Tile

__all__ = ["NETWORKS", "Layer", "install", "layers", "main", "milliseconds", "tune"]


class Layer(NamedTuple):
    """One convolution, with a square filter and "same" padding."""

    N: int
    C: int
    K: int
    H: int
    W: int
    R: int
    stride: int


Timer = Callable[[Callable[[], object]], float]

_WARM_UP, _ROUNDS = 3, 20
_LARGEST = 1 << 27  # elements of a tensor that is made to try a bucket


def tune(
    shapes: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
) -> Path:
    """Time every tile on forward, dgrad and wgrad of every layer; write the fastest of each bucket.

    Layers of the same bucket are added up. What the file holds of other buckets stays.

    Args:
        shapes: (N, C, K, H, W, R, stride), see `Layer` and `layers`.
        dtype: of activations and weights.
        device: where to time.
        timer: returns how long a call takes, in any unit; by default, `milliseconds`.

    Returns:
        The file: ``DCX_TILES``, or the one of this GPU in the user's cache directory.
    """
    times: defaultdict[Bucket, defaultdict[Tile, float]]
    times = defaultdict(lambda: defaultdict(float))
    for shape in dict.fromkeys(Layer(*shape) for shape in shapes):
        for kind, call in _passes(shape, dtype, torch.device(device)):
            for tile, bucket, time in _time_all(kind, call, dtype.itemsize, timer or milliseconds):
                times[bucket][tile] += time
    fastest = {bucket: _fastest(by_tile) for bucket, by_tile in times.items()}
    return _write({bucket: tile for bucket, tile in fastest.items() if tile is not None}, device)


def install(timer: Timer | None = None, device: torch.device | str = "cuda") -> None:
    """Have buckets timed at their first use, where ``DCX_AUTOTUNE=1`` asks for it.

    Args:
        timer: as in `tune`.
        device: as in `tune`.
    """

    def first_use(bucket: Bucket) -> Tile | None:
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return None  # a graph records launches: nothing can be timed now
        dtype = torch.bfloat16 if bucket.itemsize == 2 else torch.float32
        passes = _passes(_layer_of(bucket), dtype, torch.device(device))
        call = next(call for kind, call in passes if kind == bucket.kind)
        timed = _time_all(bucket.kind, call, bucket.itemsize, timer or milliseconds)
        tile = _fastest({tile: time for tile, _, time in timed})
        if tile is not None:
            _write({bucket: tile}, device)
        return tile

    tiles.on_first_use(first_use)


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU; the first calls, which compile, do not count."""
    for _ in range(_WARM_UP):
        call()
    pairs = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairs)


# --- what is timed --------------------------------------------------------------------------------


def _passes(
    layer: Layer, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Kind, Callable[[], object]]]:
    """Yield the three passes of a layer, whose sets are packed already."""
    # compiled kernels come with these: only where something is timed
    from dcx_kernels.kernels.triton.conv_wgrad import channel_conv2d_wgrad
    from dcx_kernels.kernels.triton.convolution import channel_conv2d_dgrad, channel_conv2d_fwd

    def random(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, device=device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last)

    N, C, K, H, W, R, stride = layer
    window = (stride,) * 2, (R // 2,) * 2, (1, 1)
    x, weight = random(N, C, H, W), random(K, C, R, R)
    P, Q = ((size + 2 * (R // 2) - R) // stride + 1 for size in (H, W))
    dy = random(N, K, P, Q)
    yield "conv", lambda: channel_conv2d_fwd(x, weight, None, None, None, *window, 1, 1)
    yield "conv", lambda: channel_conv2d_dgrad(dy, x, weight, None, None, *window, 1, 1)
    yield "wgrad", lambda: channel_conv2d_wgrad(dy, x, (R, R), *window, 1)


def _time_all(
    kind: Kind, call: Callable[[], object], itemsize: int, timer: Timer
) -> Iterator[tuple[Tile, Bucket, float]]:
    """Yield every tile with the bucket that was asked for and the time; infinity if it failed."""
    for tile in tiles.DISTINCT[kind, itemsize]:
        with tiles.forced(tile) as asked:
            try:
                time = timer(call)
            except OutOfResources:
                time = math.inf
        if asked:
            yield tile, asked[0], time


def _fastest(times: dict[Tile, float]) -> Tile | None:
    tile = min(times, key=lambda tile: times[tile], default=None)
    return tile if tile is not None and times[tile] < math.inf else None


def _layer_of(bucket: Bucket) -> Layer:
    """Return a layer of that bucket, with 3 x 3 filters; fewer pixels where they would not fit."""
    out, inner = 1 << bucket.out, 1 << bucket.inner
    rows = min(1 << bucket.rows, max(16, _LARGEST // max(out, inner)))
    side = 1 << min(5, (rows.bit_length() - 1) // 2)
    return Layer(rows // side**2, inner, out, side, side, 3, 1)


def _write(found: dict[Bucket, Tile], device: torch.device | str) -> Path:
    """Add to the file, which is replaced all at once: other processes may read it."""
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = tiles.table_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known |= {str(bucket): list(tile) for bucket, tile in found.items()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


# --- which layers ---------------------------------------------------------------------------------

_VGG = "3-64 64-64 / 64-128 128-128 / 128-256 256-256 / 256-512 512-512 / 512-512"
_RESNET_50_STAGES = ((64, 56, 1), (128, 56, 2), (256, 28, 2), (512, 14, 2))


def _vgg19() -> Iterator[tuple[int, ...]]:
    size = 32
    for stage in _VGG.split(" / "):
        for channels in stage.split():
            c, k = map(int, channels.split("-"))
            yield c, k, size, size, 3, 1
        size //= 2


def _resnet18() -> Iterator[tuple[int, ...]]:
    yield 3, 64, 224, 224, 7, 2
    yield 64, 64, 56, 56, 3, 1
    for k, size in ((128, 56), (256, 28), (512, 14)):
        yield k // 2, k, size, size, 3, 2
        yield k // 2, k, size, size, 1, 2
        yield k, k, size // 2, size // 2, 3, 1


def _resnet50() -> Iterator[tuple[int, ...]]:
    yield 3, 64, 224, 224, 7, 2
    for width, size, stride in _RESNET_50_STAGES:
        before, after = max(64, 2 * width) if width > 64 else 64, 4 * width
        small = size // stride
        yield before, width, size, size, 1, 1
        yield width, width, size, size, 3, stride
        yield before, after, size, size, 1, stride
        yield width, after, small, small, 1, 1
        yield after, width, small, small, 1, 1
        yield width, width, small, small, 3, 1


NETWORKS = {"vgg19": _vgg19, "resnet18": _resnet18, "resnet50": _resnet50}
"""Networks whose layers `layers` knows: VGG-19 for 32 x 32 pixels, ResNets for 224 x 224."""


def layers(network: str, batch: int, density: float = 1.0) -> list[Layer]:
    """Return the different convolutions of a network.

    Args:
        network: one of `NETWORKS`.
        batch: N.
        density: kept fraction of all channels but those of the image.
    """

    def kept(channels: int) -> int:
        return channels if channels == 3 else max(1, round(channels * density))

    found = (Layer(batch, kept(c), kept(k), *rest) for c, k, *rest in NETWORKS[network]())
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune from the command line; prints the file that was written."""
    parser = argparse.ArgumentParser(description="time tiles on this GPU and write a file of them")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args(arguments)
    shapes = [layer for d in args.density for layer in layers(args.network, args.batch, d)]
    sys.stdout.write(f"{tune(shapes, getattr(torch, args.dtype))}\n")


if __name__ == "__main__":
    main()

"""What `offline` compiles: calls of the real launchers, with tensors that have no memory.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from offline import Case
from torch import Tensor

from dcx_kernels.kernels import tiles
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.slices import Slice
from dcx_kernels.kernels.tiles import Tile
from dcx_kernels.kernels.triton import (
    batch_norm,
    conv_wgrad,
    convolution,
    gate,
    optimizer,
    selection,
    slices,
    union,
)

__all__ = ["OPERATORS", "cases", "layer_cases", "some", "widths"]

LAST, FIRST = torch.channels_last, torch.contiguous_format
WINDOW = (1, 1), (1, 1), (1, 1)

# tensors lie on no GPU here, and launchers that ask would leave them to the reference
for module in (slices, optimizer):
    module.serves = lambda device: True  # type: ignore[attr-defined]


def cases(dtype: str = "bfloat16", full: bool = False) -> list[Case]:
    """Return what is compiled: every tile with both forms of weights; with ``full``, all flags."""
    kind = getattr(torch, dtype)
    return [*_convolutions(kind, full), *_wgrads(kind, full), *_others(kind)]


def some(dtype: str = "bfloat16") -> list[Case]:
    """Return a part of `cases`: big and small tiles, what is fused the most, other kernels."""
    parts = "fwd 128x128", "fwd 32x32x32 packed", "behind_relu", "wgrad k64 c64", "nhwc 127", "sgd"
    return [
        (label, call)
        for label, call in cases(dtype)
        if any(part in label for part in parts) and "full" not in label
    ]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, layout: Any = LAST) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


def norm(channels: int) -> Norm:
    """Return the vectors of a norm."""
    return Norm(*(torch.empty(channels, device="meta") for _ in range(3)))


def norm_grad(y: Tensor, form: str) -> NormGrad:
    """Return what undoes a norm: "before", "behind", "behind_relu"."""
    k = y.shape[1]
    vectors = [torch.empty(k, device="meta") for _ in range(3)]
    if form == "before":
        return NormGrad(y, *vectors)
    return NormGrad(y, *vectors, norm(k), form == "behind_relu")


def _convolutions(dtype: torch.dtype, full: bool) -> Iterator[Case]:
    table = tiles.DISTINCT["conv", dtype.itemsize]
    for tile in table:
        for form in ("packed", "full"):
            yield _fwd(dtype, tile, form)
            yield _dgrad(dtype, tile, form)
    for tile in table if full else (table[0], table[1]):
        yield _fwd(dtype, tile, "packed", activate=True, statistics=True)
        yield _dgrad(dtype, tile, "packed", source="behind_relu", mask=True)
    for tile in table if full else table[1:2]:
        yield _fwd(dtype, tile, "packed", odd=True)
        yield _dgrad(dtype, tile, "packed", odd=True)
    if not full:
        return
    for tile in table:
        for form in ("packed", "full"):
            for odd in (False, True):
                yield _fwd(dtype, tile, form, odd, layout=FIRST)
                yield _dgrad(dtype, tile, form, odd, layout=FIRST)
                yield _fwd(dtype, tile, form, odd, activate=True, statistics=True)
                yield _fwd(dtype, tile, form, odd, statistics=True)
                for source in ("before", "behind", "behind_relu"):
                    for mask in (False, True):
                        yield _dgrad(dtype, tile, form, odd, source=source, mask=mask)


def _label(name: str, tile: Tile, form: str, odd: bool, *more: str) -> str:
    size = "x".join(map(str, tile[:3]))
    return " ".join([name, size, form, "odd" if odd else "aligned", *filter(None, more)])


def _operands(
    dtype: torch.dtype, form: str, odd: bool, layout: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    k = c = 127 if odd else 128
    x, dy = (empty(64, n, 16, 16, dtype=dtype, layout=layout) for n in (c, k))
    weight = empty(k, c, 3, 3, dtype=dtype, layout=FIRST)
    if form == "packed":
        return x, dy, weight, None
    wide = empty(256, 256, 3, 3, dtype=dtype, layout=FIRST)
    return x, dy, wide, torch.arange(k, device="meta")


def _fwd(
    dtype: torch.dtype,
    tile: Tile,
    form: str,
    odd: bool = False,
    layout: Any = LAST,
    activate: bool = False,
    statistics: bool = False,
) -> Case:
    def call() -> None:
        x, _, weight, idx = _operands(dtype, form, odd, layout)
        x_norm = norm(x.shape[1]) if activate else None
        args = (x, x_norm, weight, None, idx, idx, *WINDOW, 1, 1, statistics)
        with tiles.forced(tile):
            convolution.fused_conv2d_fwd(*args)

    more = ("nchw" if layout is FIRST else "", "activate" * activate, "moments" * statistics)
    return _label("fwd", tile, form, odd, *more), call


def _dgrad(
    dtype: torch.dtype,
    tile: Tile,
    form: str,
    odd: bool = False,
    layout: Any = LAST,
    source: str = "",
    mask: bool = False,
) -> Case:
    def call() -> None:
        x, dy, weight, idx = _operands(dtype, form, odd, layout)
        grad = norm_grad(torch.empty_like(dy), source) if source else None
        x_norm = norm(x.shape[1]) if mask else None
        args = (dy, grad, x, x_norm, weight, idx, idx, *WINDOW, 1, 1, False)
        with tiles.forced(tile):
            convolution.fused_conv2d_dgrad(*args)

    more = ("nchw" if layout is FIRST else "", source, "mask" * mask)
    return _label("dgrad", tile, form, odd, *more), call


def _wgrads(dtype: torch.dtype, full: bool) -> Iterator[Case]:
    channels = (16, 32, 64, 128)
    pairs = [(k, c) for k in channels for c in channels if full or k >= c]
    for k, c in pairs:
        yield _wgrad(dtype, k, c)
    for k, c in pairs if full else [(128, 128)]:
        yield _wgrad(dtype, k - 1, c - 1)
        yield _wgrad(dtype, k, c, "behind_relu", activate=True)
    if full:
        for k, c in pairs:
            for source in ("before", "behind"):
                yield _wgrad(dtype, k, c, source)
            yield _wgrad(dtype, k, c, activate=True)


def _wgrad(dtype: torch.dtype, k: int, c: int, source: str = "", activate: bool = False) -> Case:
    def call() -> None:
        x, dy = (empty(256, n, 16, 16, dtype=dtype) for n in (c, k))
        conv_wgrad.channel_conv2d_wgrad(
            dy, x, (3, 3), *WINDOW, 1,
            x_norm=norm(c) if activate else None,
            dy_grad=norm_grad(torch.empty_like(dy), source) if source else None,
        )  # fmt: skip

    aligned = "odd" if k % 8 else "aligned"
    return " ".join(
        filter(None, [f"wgrad k{k} c{c}", aligned, source, "activate" * activate])
    ), call


# --- the other kernels ----------------------------------------------------------------------------


def _others(dtype: torch.dtype) -> Iterator[Case]:
    for layout in (LAST, FIRST):
        name = "nhwc" if layout is LAST else "nchw"
        for channels in (128, 127):
            sizes = 64, channels, channels, 16, 16, layout
            more = f"{name} {channels}"
            yield f"batch norm fwd {more}", lambda a=sizes: _batch_norm_fwd(*a, dtype=dtype)
            yield f"batch norm bwd {more}", lambda a=sizes: _batch_norm_bwd(*a, dtype=dtype)
            yield f"union {more}", lambda a=sizes: _union(*a, dtype=dtype)
    yield "slices", lambda: _slices(32, 16)
    yield "sgd", lambda: _sgd(32, 16)
    yield "adamw", lambda: _adamw(32, 16)
    yield "k winners", lambda: gate.k_winners(torch.empty(64, 512, device="meta"), 100)
    yield (
        "select",
        lambda: selection.select_channels(torch.empty(96, device="meta"), [64, 32], 50, 1),
    )


def _batch_norm_fwd(
    n: int, k: int, c: int, h: int, w: int, layout: Any, dtype: torch.dtype = torch.bfloat16
) -> None:
    x = empty(n, c, h, w, dtype=dtype, layout=layout)
    wide = [torch.empty(1024, device="meta") for _ in range(2)]
    vectors = [torch.empty(c, device="meta") for _ in range(2)]
    active = torch.empty(c, device="meta", dtype=torch.int64)
    for training in (True, False):
        batch_norm.channel_batch_norm_fwd(x, *vectors, *wide, active, training, 0.1, 1e-5, True)


def _batch_norm_bwd(
    n: int, k: int, c: int, h: int, w: int, layout: Any, dtype: torch.dtype = torch.bfloat16
) -> None:
    x = empty(n, c, h, w, dtype=dtype, layout=layout)
    vectors = [torch.empty(c, device="meta") for _ in range(4)]
    for per_sample in (False, True):
        y, dy = torch.empty_like(x), torch.empty_like(x)
        batch_norm.channel_batch_norm_bwd(dy, x, y, *vectors, True, 1e-5, per_sample)


def _union(
    n: int, k: int, c: int, h: int, w: int, layout: Any, dtype: torch.dtype = torch.bfloat16
) -> None:
    a, b = (empty(n, m, h, w, dtype=dtype, layout=layout) for m in (k, c))
    lists = [torch.empty(m, device="meta", dtype=torch.int64) for m in (k, c)]
    union.union_add(a, b, *lists, max(k, c) + 1)


def _slice(k: int, c: int) -> tuple[Tensor, Slice]:
    lists = torch.arange(k), torch.arange(c)
    return torch.zeros(k + 1, c + 2, 3, 3), Slice((k + 1, c + 2, 3, 3), *lists)


def _slices(k: int, c: int) -> None:
    full, one = _slice(k, c)
    packed = slices.gather_slices([full, full], [one, None])
    slices.scatter_slices_([full, full], packed, [one, None])


def _sgd(k: int, c: int) -> None:
    param, one = _slice(k, c)
    grad, buffer = torch.zeros(one.packed_shape), torch.zeros_like(param)
    optimizer.sgd_slices_(
        [param], [grad], [buffer], [one], [True], lr=0.1, momentum=0.9, dampening=0.0,
        weight_decay=1e-4, nesterov=True, maximize=False,
    )  # fmt: skip


def _adamw(k: int, c: int) -> None:
    param, one = _slice(k, c)
    grad, first, second = torch.zeros(one.packed_shape), *(torch.zeros_like(param),) * 2
    optimizer.adamw_slices_(
        [param], [grad], [first], [second], None, [torch.tensor(0.0)], [one], lr=1e-3,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, maximize=False,
    )  # fmt: skip


# --- new widths every step ------------------------------------------------------------------------


def widths(count: int, seed: int = 0) -> Iterator[tuple[int, int, int, int, int, Any]]:
    """Yield random (N, k, c, H, W, layout): 1 to 1024 channels, half of them multiples of 8."""
    draw = random.Random(seed)
    for _ in range(count):
        step = draw.choice([1, 8]), draw.choice([1, 8])
        k, c = (s * round(2 ** draw.uniform(0, 10) / s + 0.5) for s in step)
        n, h, w = draw.randint(1, 512), draw.randint(1, 64), draw.randint(1, 64)
        yield n, k, c, h, w, draw.choice([LAST, FIRST])


def layer_cases(op: str, count: int) -> Iterator[Case]:
    """Yield calls of one operator at random widths, stride, filter, and form of the weight."""
    draw = random.Random(1)
    for n, k, c, h, w, layout in widths(count):
        r, stride, packed = draw.choice([1, 3]), draw.choice([1, 2]), draw.random() < 0.5
        yield op, lambda a=(n, k, c, h, w, layout, r, stride, packed): OPERATORS[op](*a)


def _layer(
    n: int, k: int, c: int, h: int, w: int, layout: Any, r: int, stride: int, packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Any]:
    window = (stride,) * 2, (r // 2,) * 2, (1, 1)
    p, q = ((size - 1) // stride + 1 for size in (h, w))
    x, dy = empty(n, c, h, w, layout=layout), empty(n, k, p, q, layout=layout)
    if packed:
        return x, dy, empty(k, c, r, r, layout=FIRST), None, None, window
    in_idx, out_idx = (torch.arange(m, device="meta") for m in (c, k))
    return x, dy, empty(1024, 1024, r, r, layout=FIRST), in_idx, out_idx, window


def _layer_fwd(*sizes: Any) -> None:
    x, _, weight, in_idx, out_idx, window = _layer(*sizes)
    convolution.channel_conv2d_fwd(x, weight, None, in_idx, out_idx, *window, 1, 1)


def _layer_dgrad(*sizes: Any) -> None:
    x, dy, weight, in_idx, out_idx, window = _layer(*sizes)
    convolution.channel_conv2d_dgrad(dy, x, weight, in_idx, out_idx, *window, 1, 1)


def _layer_wgrad(*sizes: Any) -> None:
    x, dy, weight, _, _, window = _layer(*sizes)
    conv_wgrad.channel_conv2d_wgrad(dy, x, weight.shape[2:], *window, 1)


OPERATORS: dict[str, Callable[..., None]] = {
    "fwd": _layer_fwd,
    "dgrad": _layer_dgrad,
    "wgrad": _layer_wgrad,
    "batch norm fwd": lambda *sizes: _batch_norm_fwd(*sizes[:6]),
    "batch norm bwd": lambda *sizes: _batch_norm_bwd(*sizes[:6]),
    "union": lambda *sizes: _union(*sizes[:6]),
    "slices": lambda n, k, c, *_: _slices(k % 64 + 1, c % 64 + 1),
    "sgd": lambda n, k, c, *_: _sgd(k % 64 + 1, c % 64 + 1),
    "adamw": lambda n, k, c, *_: _adamw(k % 64 + 1, c % 64 + 1),
}

"""Operators on layers of real networks, in every arm, each with a more exact result to check it by.

Arms: **own** (our kernel, forced), **library** (the packed tensors given to cuDNN by our backend),
**thin** (torch on the same compact tensors, widths as they are), **mask** and **dense**. Inputs are
made once, outside of the timed part; ``moved`` and ``macs`` are what is needed at the density.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, R S filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import environment_set
from benchmarks.problem import on_grid
from dcx_kernels.kernels import backend

__all__ = [
    "CONV_LAYERS",
    "NORM_LAYERS",
    "TINY",
    "UNION_LAYERS",
    "Case",
    "Conv",
    "backend_of",
    "conv_cases",
    "norm_cases",
    "union_cases",
]  # fmt: skip

_backward = torch.ops.aten.convolution_backward.default
_MOMENTUM, _EPS = 0.1, 1e-5
CONV = {"own": {"DCX_CONV": "own"}, "library": {"DCX_CONV": "library"}}


class Conv(NamedTuple):
    """A convolution with "same" padding, and the batch it is measured at."""

    batch: int
    channels_in: int
    channels_out: int
    extent: int
    kernel: int
    stride: int


# one of every kind that VGG-19 (32x32 images), ResNet-18 and ResNet-50 (224x224) have
CONV_LAYERS = {
    "vgg19 3x3 256 @8": Conv(1024, 256, 256, 8, 3, 1),
    "resnet50 1x1 256-64 @56": Conv(256, 256, 64, 56, 1, 1),
    "resnet50 3x3 128 @28": Conv(256, 128, 128, 28, 3, 1),
    "vgg19 3x3 64 @32": Conv(1024, 64, 64, 32, 3, 1),
    "resnet50 1x1 1024-256 @14": Conv(256, 1024, 256, 14, 1, 1),
    "resnet18 3x3 64 @56": Conv(256, 64, 64, 56, 3, 1),
    "vgg19 3x3 512 @4": Conv(1024, 512, 512, 4, 3, 1),
    "resnet18 3x3/2 128-256 @28": Conv(256, 128, 256, 28, 3, 2),
    "resnet50 1x1 512-2048 @7": Conv(256, 512, 2048, 7, 1, 1),
    "vgg19 3x3 128 @16": Conv(1024, 128, 128, 16, 3, 1),
    "resnet18 1x1/2 64-128 @56": Conv(256, 64, 128, 56, 1, 2),
    "resnet50 1x1 64-256 @56": Conv(256, 64, 256, 56, 1, 1),
    "resnet18 3x3 512 @7": Conv(256, 512, 512, 7, 3, 1),
    "vgg19 3x3 512 @2": Conv(1024, 512, 512, 2, 3, 1),
    "resnet50 7x7/2 3-64 @224": Conv(256, 3, 64, 224, 7, 2),
}
NORM_LAYERS = {
    "resnet50 256 @56": Conv(256, 1, 256, 56, 1, 1),
    "vgg19 64 @32": Conv(1024, 1, 64, 32, 1, 1),
    "vgg19 512 @4": Conv(1024, 1, 512, 4, 1, 1),
    "resnet18 512 @7": Conv(256, 1, 512, 7, 1, 1),
}
UNION_LAYERS = {
    "resnet50 256 @56": Conv(256, 1, 256, 56, 1, 1),
    "resnet18 512 @7": Conv(256, 1, 512, 7, 1, 1),
}
# for dry runs
TINY = {"tiny 3x3/2 12-17 @6": Conv(2, 12, 17, 6, 3, 2)}


@dataclass
class Case:
    """One operator on one layer, in several arms that compute the same.

    Args:
        arms: name -> function; what it returns is compared, after ``compact[name]`` if given.
        truth: the result more exactly; None: the results are not numbers that could be compared.
        baseline: arm of torch that the others are divided by.
        unchecked: arms that compute something else (such as all channels of an unmasked input).
        macs, moved: multiply-accumulates and bytes (read and written) that are needed.
    """

    op: str
    layer: str
    batch: int
    density: float
    widths: str
    c_in: int
    c_out: int
    dtype: str
    arms: dict[str, Callable[[], Any]]
    baseline: str
    truth: Callable[[], Tensor] | None = None
    macs: int = 0
    moved: int = 0
    layout: str = "NHWC"
    compact: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.op} {self.layer} d={self.density:g} {self.widths}"


def backend_of(device: str, name: str | None = None) -> ModuleType:
    """Return a kernel backend: Triton's on a GPU, the reference in a dry run."""
    wanted = name or ("triton" if device == "cuda" else "reference")
    with environment_set({"DCX_BACKEND": wanted}):
        return backend.choose(torch.device(device))


def conv_cases(
    name: str, layer: Conv, density: float, grid: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Yield fwd, dgrad and wgrad of a convolution."""
    kernels, draw = backend_of(device), _Draw(device, dtype)
    c = layer.channels_in if layer.channels_in <= 8 else _width(layer.channels_in, density, grid)
    k = _width(layer.channels_out, density, grid)
    into, out = draw.set(layer.channels_in, c), draw.set(layer.channels_out, k)
    pixels = -(-layer.extent // layer.stride)
    x = draw.image(layer.batch, layer.channels_in, layer.extent)
    dy = draw.image(layer.batch, layer.channels_out, pixels)
    full = draw.normal(layer.channels_out, layer.channels_in, layer.kernel, layer.kernel)
    x_c, dy_c = _take(x, into), _take(dy, out)
    packed = full[out][:, into].contiguous()
    in_mask, out_mask = (
        torch.zeros(1, n, 1, 1, device=device, dtype=dtype).index_fill_(1, idx, 1)
        for n, idx in ((layer.channels_in, into), (layer.channels_out, out))
    )
    # in the layouts that torch's own modules have after .to(memory_format=channels_last)
    full, thin = (w.contiguous(memory_format=torch.channels_last) for w in (full, packed))
    dense_dy, dense_x = (dy * out_mask, x * in_mask) if density < 1 else (dy, x)
    window = [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1]
    pads = (*window, False, [0, 0], 1)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(x, w, None, *pads)

    def gradient(dy: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        wanted = [index == which for index in range(3)]
        gradients: tuple[Tensor, ...] = _backward(dy, x, w, None, *pads, wanted)
        return gradients[which]

    lists, geometry = (None, None), (*window, 1, 1)
    ours: dict[str, Callable[[], Tensor]] = {
        "fwd": lambda: kernels.channel_conv2d_fwd(x_c, packed, None, *lists, *geometry),
        "dgrad": lambda: kernels.channel_conv2d_dgrad(dy_c, x_c, packed, *lists, *geometry),
        "wgrad": lambda: kernels.channel_conv2d_wgrad(
            dy_c, x_c, [layer.kernel] * 2, *window, geometry[-1]
        ),
    }
    torchs: dict[str, dict[str, Callable[[], Tensor]]] = {
        "fwd": {
            "thin": lambda: forward(x_c, thin),
            "mask": lambda: forward(x * in_mask, full),
            "dense": lambda: forward(x, full),
        },
        "dgrad": {
            "thin": lambda: gradient(dy_c, x_c, thin, 0),
            "mask": lambda: gradient(dense_dy, x, full, 0) * in_mask,
            "dense": lambda: gradient(dense_dy, x, full, 0),
        },
        "wgrad": {
            "thin": lambda: gradient(dy_c, x_c, thin, 1),
            "mask": lambda: gradient(dense_dy, dense_x, full, 1),
            "dense": lambda: gradient(dense_dy, x, full, 1),
        },
    }
    exact = _exacter(dtype)
    truths: dict[str, Callable[[], Tensor]] = {
        "fwd": lambda: forward(x_c.to(exact), thin.to(exact)),
        "dgrad": lambda: gradient(dy_c.to(exact), x_c.to(exact), thin.to(exact), 0),
        "wgrad": lambda: gradient(dy_c.to(exact), x_c.to(exact), thin.to(exact), 1),
    }
    compacts: dict[str, Callable[[Tensor], Tensor]] = {
        "fwd": lambda y: y[:, out],
        "dgrad": lambda dx: dx[:, into],
        "wgrad": lambda dw: dw[out][:, into],
    }
    moved = _bytes(x_c) + _bytes(dy_c) + _bytes(packed)
    for op in ("fwd", "wgrad") if layer.channels_in <= 8 else ("fwd", "dgrad", "wgrad"):
        arms = {arm: _under(settings, ours[op]) for arm, settings in CONV.items()}
        arms["thin"] = torchs[op]["thin"]
        if density < 1:
            arms |= {arm: torchs[op][arm] for arm in ("mask", "dense")}
        yield Case(
            f"conv_{op}", name, layer.batch, density, _label(density, grid), c, k, _name(dtype),
            arms, "thin", truths[op], layer.batch * pixels**2 * packed.numel(), moved,
            compact=dict.fromkeys(("mask", "dense"), compacts[op]),
            unchecked=("dense",) if op == "fwd" else (),
        )  # fmt: skip


def norm_cases(
    name: str, layer: Conv, density: float, grid: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Yield batch norm with ReLU, fwd and bwd; ours measures saliency as well.

    Needed are three passes over the tensor in fwd (x for the statistics; x and y), five in bwd.
    """
    kernels, draw = backend_of(device), _Draw(device, dtype)
    k, full = _width(layer.channels_out, density, grid), layer.channels_out
    active = draw.set(full, k)
    x, dy = (draw.image(layer.batch, full, layer.extent) for _ in range(2))
    x_c, dy_c = _take(x, active), _take(dy, active)
    lists = None if density == 1 else active

    def vectors(count: int) -> tuple[Tensor, ...]:
        ones = torch.ones(count, device=device)
        return ones * 0.9, ones * 0.1

    w, b = vectors(k)
    mean, var = torch.zeros(full, device=device), torch.ones(full, device=device)

    def own_fwd() -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = kernels.channel_batch_norm_fwd(
            x_c, w, b, mean, var, lists, True, _MOMENTUM, _EPS, True
        )
        return out

    y_c, mean_c, invstd_c = backend_of(device, "reference").channel_batch_norm_fwd(
        x_c, w, b, mean, var, lists, True, _MOMENTUM, _EPS, True
    )

    def own_bwd() -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = kernels.channel_batch_norm_bwd(
            dy_c, x_c, y_c, w, b, mean_c, invstd_c, True, _EPS, False
        )
        return out

    def plain(x: Tensor, dy: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        w, b = (v.to(kind).requires_grad_() for v in vectors(x.shape[1]))
        x = x.detach().requires_grad_()
        m, v = (f(x.shape[1], device=device, dtype=kind) for f in (torch.zeros, torch.ones))
        y = F.batch_norm(x, m, v, w, b, True, _MOMENTUM, _EPS).relu_()

        @torch.no_grad()
        def fwd() -> Tensor:
            return F.batch_norm(x, m, v, w, b, True, _MOMENTUM, _EPS).relu_()

        return fwd, lambda: torch.autograd.grad(y, [x, w, b], dy, retain_graph=True)[0]

    thin, dense = plain(x_c, dy_c), plain(x, dy)
    for index, (op, own, passes) in enumerate((("fwd", own_fwd, 3), ("bwd", own_bwd, 5))):
        arms: dict[str, Callable[[], Any]] = {"own": own, "thin": thin[index]}
        compact: dict[str, Callable[[Any], Tensor]] = {"own": _first}
        if density < 1:
            arms["dense"] = dense[index]
            compact["dense"] = lambda y: y[:, active]
        wide = lambda i=index: plain(x_c.double(), dy_c.double())[i]()  # noqa: E731
        yield Case(
            f"batch_norm_{op}", name, layer.batch, density, _label(density, grid), k, k,
            _name(dtype), arms, "thin", wide, moved=passes * _bytes(x_c), compact=compact,
        )  # fmt: skip


def union_cases(
    name: str, layer: Conv, density: float, grid: str, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Yield the sum of two compact tensors with sets of their own."""
    kernels, reference = backend_of(device), backend_of(device, "reference")
    draw, full = _Draw(device, dtype), layer.channels_out
    k = _width(full, density, grid)
    sets = [draw.set(full, k) for _ in range(2)]
    both = torch.unique(torch.cat(sets))
    places = [torch.searchsorted(both, idx) for idx in sets]
    a, b = (draw.image(layer.batch, k, layer.extent) for _ in range(2))
    count = int(both.shape[0])
    arguments = (a, b, *places, count)
    yield Case(
        "union_add", name, layer.batch, density, _label(density, grid), k, count, _name(dtype),
        {
            "own": lambda: kernels.union_add(*arguments),
            "torch": lambda: reference.union_add(*arguments),
        },
        "torch", lambda: reference.union_add(a.double(), b.double(), *places, count),
        moved=_bytes(a) + _bytes(b) + layer.batch * count * layer.extent**2 * a.element_size(),
    )  # fmt: skip


class _Draw:
    """Random tensors, the same ones for the same case."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def image(self, *shape: int) -> Tensor:
        n, c, extent = shape
        return self.normal(n, c, extent, extent).contiguous(memory_format=torch.channels_last)

    def set(self, channels: int, count: int) -> Tensor:
        order = torch.randperm(channels, generator=self._generator, device=self.device)
        return order[:count].sort().values


def _width(channels: int, density: float, grid: str) -> int:
    return channels if density == 1 else on_grid(density * channels, channels, grid)


def _label(density: float, grid: str) -> str:
    return "full" if density == 1 else grid


def _take(x: Tensor, idx: Tensor) -> Tensor:
    return x[:, idx].contiguous(memory_format=torch.channels_last)


def _bytes(x: Tensor) -> int:
    return math.prod(x.shape) * x.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exacter(dtype: torch.dtype) -> torch.dtype:
    """Return a more exact dtype; float64 convolutions of whole batches would take seconds."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _under(settings: dict[str, str], call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with environment_set(settings):
            return call()

    return run


def _first(results: tuple[Tensor, ...]) -> Tensor:
    return results[0]

"""What the native library does on a CPU, beside what else could do it.

Legend: d density; N batch; c and k active input and output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels import models
from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.kernels import native, reference
from dcx_kernels.kernels.slices import Scratch, Slice

__all__ = ["LAYOUTS", "Case", "cases"]

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
Call = Callable[[], object]

# VGG-19's layers at d = 0.5, 32x32 images, and two odd widths: channels, image
_NORMS = [(32, 32), (64, 16), (128, 8), (256, 4), (256, 2), (77, 8), (19, 32)]
# M-CifarNet's inner layers: channels in and out, image, stride
_GATED = [(64, 64, 30, 1), (64, 128, 30, 2), (128, 128, 15, 1), (128, 192, 15, 2), (192, 192, 8, 1)]


class Case(NamedTuple):
    """One piece of work and who does it.

    Args:
        op: its name.
        case: which layer.
        layout: NCHW, NHWC, or "" where there is none.
        batch: N, or 0.
        arms: name -> call, "native" last; calls of one case return the same tensors.
        alike: whether these are compared before anything is timed.
    """

    op: str
    case: str
    layout: str
    batch: int
    arms: dict[str, Call]
    alike: bool = True


def cases() -> Iterator[Case]:
    """Make all cases, one after another: they hold their tensors.

    Raises:
        RuntimeError: if the native library of CPUs is not there.
    """
    lacking = native.load("cpu")
    if lacking is not None:
        raise RuntimeError(f"expected the native library of CPUs, got: {lacking}")
    from dcx_kernels.kernels.native import cpu

    for layout in LAYOUTS:
        for channels, size in _NORMS:
            for by_sample in (False, True):
                yield _norm(channels, size, layout, by_sample, cpu)
    for layout in LAYOUTS:
        for channels, size in _NORMS[:5]:
            yield _union(channels, size, layout, cpu)
    for batch in (1, 32):
        for layer in _GATED:
            yield from _gated(*layer, batch, cpu)
    yield from _slices(cpu)


def _norm(channels: int, size: int, layout: str, by_sample: bool, cpu: ModuleType) -> Case:
    """Batch norm and ReLU, forward and backward with saliency, half of the statistics active."""
    x, dy = (_images(32, channels, size, layout) for _ in "xy")
    weight, bias = torch.randn(2, channels)
    running, active = torch.ones(2, 2 * channels), torch.arange(channels) * 2

    def run(own: ModuleType) -> object:
        y, mean, invstd = own.channel_batch_norm_fwd(
            x, weight, bias, running[0], running[1], active, True, 0.1, 1e-5, True
        )
        return own.channel_batch_norm_bwd(
            dy, x, y, weight, bias, mean, invstd, True, 1e-5, by_sample
        )

    op = "batch norm, saliency by sample" if by_sample else "batch norm"
    arms = {"reference": lambda: run(reference), "native": lambda: run(cpu)}
    return Case(op, f"{channels}@{size}", layout, 32, arms)


def _union(channels: int, size: int, layout: str, cpu: ModuleType) -> Case:
    """The sum of two terms that share half of their channels."""
    num_out = channels * 3 // 2
    a, b = (_images(32, channels, size, layout) for _ in "ab")
    places = torch.arange(channels), torch.arange(num_out - channels, num_out)
    arms: dict[str, Call] = {
        "reference": lambda: reference.union_add(a, b, *places, num_out),
        "native": lambda: cpu.union_add(a, b, *places, num_out),
    }
    return Case("union add", f"{channels}@{size}", layout, 32, arms)


def _gated(
    num_in: int, num_out: int, size: int, stride: int, batch: int, cpu: ModuleType
) -> Iterator[Case]:
    """A 3x3 convolution of every sample's own half of the channels; dense computes all of them."""
    window = (stride, stride), (1, 1), (1, 1)
    lists = _halves(num_in, batch), _halves(num_out, batch)
    x, weight = _images(batch, num_in, size, "NCHW"), torch.randn(num_out, num_in, 3, 3)
    few = x[:, : num_in // 2].contiguous()
    dy = torch.randn_like(F.conv2d(x, weight, None, *window))
    few_dy = dy[:, : num_out // 2].contiguous()

    def dense(*mask: bool) -> object:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *window, False, (0, 0), 1, (*mask, False)
        )

    def own(name: str, *args: object) -> dict[str, Call]:
        both = (("reference", reference), ("native", cpu))
        return {arm: lambda b=b: getattr(b, name)(*args, *lists, *window) for arm, b in both}  # type: ignore[misc]

    layer = f"{num_in}>{num_out}@{size} /{stride}"
    for op, computed, arms in (
        ("fwd", lambda: F.conv2d(x, weight, None, *window),
         own("sample_conv2d_fwd", few, weight, None)),
        ("dgrad", lambda: dense(True, False), own("sample_conv2d_dgrad", few_dy, few, weight)),
        ("wgrad", lambda: dense(False, True),
         own("sample_conv2d_wgrad", few_dy, few, weight.shape)),
    ):  # fmt: skip
        yield Case(f"gated convolution, {op}", layer, "NCHW", batch, {"dense": computed, **arms})


def _slices(cpu: ModuleType) -> Iterator[Case]:
    """All parameters of VGG-19 at d = 0.5, against torch's fused optimizers on the dense ones."""
    params = [p.detach() for p in models.vgg19(num_classes=10).parameters()]
    slices, before = [], None
    for param in params:
        if param.dim() == 4:
            now = _half(param.shape[0])
            slices.append(Slice(param.shape, now, before))
            before = now
        elif param.dim() == 2:
            slices.append(Slice(param.shape, None, before))
        else:
            slices.append(Slice(param.shape, before) if param.shape[0] != 10 else None)
    grads = [torch.randn_like(part) for part in reference.gather_slices(params, slices)]
    first, second = ([torch.rand_like(p) for p in params] for _ in "ab")
    steps = [torch.tensor(1.0) for _ in params]
    dense = [torch.nn.Parameter(p.clone()) for p in params]
    for param in dense:
        param.grad = torch.randn_like(param)
    # a rate that moves nothing: parameters stay normal numbers for however many rounds
    plain = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    sgd = {**plain, "dampening": 0.0, "maximize": False}
    adamw = {"lr": 1e-9, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    scratch, fresh = Scratch(), [False] * len(params)

    def run_sgd(own: ModuleType) -> Call:
        return lambda: own.sgd_slices_(params, grads, first, slices, fresh, scratch=scratch, **sgd)

    def run_adamw(own: ModuleType) -> Call:
        return lambda: own.adamw_slices_(
            params, grads, first, second, None, steps, slices, maximize=False, scratch=scratch,
            **adamw,
        )  # fmt: skip

    memory = [torch.empty(grad.numel()) if grad.dim() > 1 else None for grad in grads]

    def gather(own: ModuleType) -> Call:
        return lambda: own.gather_slices(params, slices, memory)

    def scatter(own: ModuleType) -> Call:
        return lambda: own.scatter_slices_(params, grads, slices)

    fused_sgd = torch.optim.SGD(dense, **plain, fused=True)  # type: ignore[arg-type]
    fused_adamw = torch.optim.AdamW(dense, **adamw, fused=True)  # type: ignore[arg-type]
    for op, torchs, run, alike in (
        ("SGD", {"dense": fused_sgd.step}, run_sgd, False),
        ("AdamW", {"dense": fused_adamw.step}, run_adamw, False),
        ("gather", {}, gather, True),
        ("scatter", {}, scatter, False),
    ):
        arms: dict[str, Call] = {**torchs, "reference": run(reference), "native": run(cpu)}
        yield Case(op, "VGG-19, d=0.5", "", 0, arms, alike)


def _images(batch: int, channels: int, size: int, layout: str) -> Tensor:
    x = torch.randn(batch, channels, size, size)
    return x.contiguous(memory_format=LAYOUTS[layout])


def _half(channels: int) -> Tensor:
    chosen = torch.randperm(channels)[: channels // 2].sort().values
    return ChannelSet.trusted(chosen, channels).indices


def _halves(channels: int, samples: int) -> Tensor:
    return torch.rand(samples, channels).argsort(1)[:, : channels // 2].sort(1).values

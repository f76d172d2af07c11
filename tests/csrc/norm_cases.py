"""Batch norm on the emulated GPU as the backend calls it, and what it is compared with."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native.cuda import batch_norm
from tolerances import assert_close_to_float64

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TYPES = {dtype: number for number, dtype in enumerate(DTYPES.values())}
SHAPES = {
    "odd": (2, 37, 3, 3),
    "prime": (7, 17, 5, 7),  # a last row that is not whole
    "whole vectors": (3, 64, 5, 4),
    "quads": (5, 12, 5, 4),
    "hundred": (4, 100, 3, 3),
    "one channel": (3, 1, 9, 7),
    "one sample": (1, 3, 17, 5),
    "several tiles": (3, 3, 48, 40),
    "large planes": (1, 2, 66, 65),  # cut into tiles
    "wide": (3, 1030, 1, 2),  # more than one block for a row
    "wide odd": (2, 2051, 1, 2),
    "short planes": (40, 5, 2, 2),
    "line": (6, 7, 31),
    "pixel": (9, 63, 1, 1),
    "matrix": (29, 63),
    "cube": (2, 3, 3, 5, 4),
}
NAMES = ["y", "mean", "invstd", "running_mean", "running_var", "dx", "dweight", "dbias", "saliency"]
Run = dict[str, Tensor]
_UNWRITTEN = 3e33


class EmulatedNorm:
    """The operators of the library, emulated: what csrc/cuda/batch_norm_op.cpp does."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.called: list[str] = []
        self.last: list[bool] = []  # which layout a call had

    def _shape(self, x: Tensor) -> tuple[list[int], bool, int]:
        pixels = x.shape[2:].numel()
        last = pixels == 1 or not x.is_contiguous()
        self.last.append(last)
        assert x.data_ptr() % 16 == 0
        return [x.shape[0], x.shape[1], pixels], last, _TYPES[x.dtype]

    def fwd(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, active: Tensor | None, training: bool, momentum: float,
        eps: float, relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        self.called.append("fwd")
        shape = self._shape(x)
        mean, invstd = _nan(2, x.shape[1]).unbind()
        y = torch.full_like(x, float("nan"))
        partial = _scratch(self.module.norm_moments_size(*shape) if training else 0)
        self.module.norm_fwd(
            *shape, _at(x), _at(y), _typed(weight), _typed(bias), _at(running_mean),
            _typed(running_var), _at(active), training, relu, momentum, eps, _at(mean),
            _at(invstd), _at(partial),
        )  # fmt: skip
        _check_scratch(partial)
        return y, mean, invstd

    def bwd(
        self, dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        mean: Tensor, invstd: Tensor, training: bool, per_sample: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        self.called.append("bwd")
        shape = self._shape(x)
        assert dy.data_ptr() % 16 == 0
        assert all(s == t or n == 1 for s, t, n in zip(dy.stride(), x.stride(), x.shape))  # noqa: B905
        channels = x.shape[1]
        dx = torch.full_like(x, float("nan"))
        dweight, dbias = _nan(2, channels).unbind()
        saliency = _nan(x.shape[0], channels) if per_sample else _nan(channels)
        slopes = _scratch(2 * channels)
        partial = _scratch(self.module.norm_sums_size(*shape, per_sample))
        self.module.norm_bwd(
            *shape, _at(dy), _at(x), _at(dx), _typed(weight), _typed(bias), _at(mean), _at(invstd),
            training, y is not None, per_sample, _at(dweight), _at(dbias), _at(saliency),
            _at(slopes), _at(partial),
        )  # fmt: skip
        _check_scratch(partial)
        _check_scratch(slopes)
        return dx, dweight, dbias, saliency


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def _scratch(size: int) -> Tensor:
    """Return memory of a number that would show, and a guard behind it."""
    return torch.full((size + 64,), _UNWRITTEN)


def _check_scratch(memory: Tensor) -> None:
    assert memory[-64:].eq(_UNWRITTEN).all(), "written behind"
    assert memory[:-64].ne(_UNWRITTEN).all(), "not all written"


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _typed(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), _TYPES[tensor.dtype])


def replace_operators(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> EmulatedNorm:
    made = EmulatedNorm(module)
    names = SimpleNamespace(batch_norm_fwd=made.fwd, batch_norm_bwd=made.bwd)
    monkeypatch.setattr(torch.ops, "dcx_native", names, raising=False)
    return made


def lay(x: Tensor, form: str) -> Tensor:
    """Return x in a form of memory, between NaN that must not be read."""
    if form == "padded":
        wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
        wide = lay(wide, "last")
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    if form == "odd address":
        flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if form == "last" and x.dim() > 3:
        order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=order)
    return x.contiguous()


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    channels = shape[1]
    running = torch.randn(2, channels + 4)
    vectors = torch.randn(2, channels + 1).to(dtype)
    return {
        "x": (torch.randn(shape) * 2 + 1).to(dtype),
        "dy": torch.randn(shape).to(dtype),
        "weight": vectors[0, 1:],  # as of a packed buffer: at an odd place
        "bias": vectors[1, 1:],
        "running_mean": running[0].clone(),
        "running_var": running[1].exp(),
        "active": torch.randperm(channels + 4)[:channels].sort().values,
    }


def run(
    backend: Any,
    given: dict[str, Tensor],
    forms: tuple[str, str] = ("first", "first"),
    compute: torch.dtype | None = None,
    training: bool = True,
    relu: bool = True,
    per_sample: bool = False,
    without: tuple[str, ...] = (),
) -> Run:
    def get(name: str) -> Tensor | None:
        if name in without:
            return None
        value = given[name] if name in ("weight", "bias") else given[name].clone()
        return value if compute is None or name == "active" else value.to(compute)

    x, dy = (lay(given[name] if compute is None else given[name].to(compute), form)
             for name, form in zip(("x", "dy"), forms, strict=True))  # fmt: skip
    weight, bias, active = get("weight"), get("bias"), get("active")
    mean, var = get("running_mean"), get("running_var")
    y, used, invstd = backend.channel_batch_norm_fwd(
        x, weight, bias, mean, var, active, training, 0.3, 1e-3, relu
    )
    kept = y if relu else None
    gradients = backend.channel_batch_norm_bwd(
        dy, x, kept, weight, bias, used, invstd, training, 1e-3, per_sample
    )
    results = (y, used, invstd, mean, var, *gradients)
    return {name: r for name, r in zip(NAMES, results, strict=True) if r is not None}


def oracle(given: dict[str, Tensor], compute: torch.dtype, **options: Any) -> Run:
    if given["x"].dim() == 2:  # the reference has no saliency by sample without pixels
        given = {n: v[..., None] if n in ("x", "dy") else v for n, v in given.items()}
        found = run(reference, given, compute=compute, **options)
        return {n: v[..., 0] if n in ("y", "dx") else v for n, v in found.items()}
    return run(reference, given, compute=compute, **options)


def _threads(rows: Tensor) -> int:
    return 2 if len(rows) < 1000 else 16


def _add(terms: Tensor) -> Tensor:
    """Add (rows, ...) in float32 as threads of a GPU do; torch's CPU would do so in float64.

    In an order of chance.
    """
    threads = _threads(terms)
    total = torch.zeros(threads, *terms.shape[1:])
    for some in terms[torch.randperm(len(terms))].split(threads):
        total[: len(some)] += some
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return total[0]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 of (rows, k) as threads of torch's kernel update them, in float32."""
    threads, channels = _threads(x), x.shape[1]
    count, mean, m2 = torch.zeros(threads, 1), *torch.zeros(2, threads, channels)
    for some in x[torch.randperm(len(x))].split(threads):
        here = slice(len(some))
        count[here] += 1
        delta = some - mean[here]
        mean[here] += delta / count[here]
        m2[here] += delta * (some - mean[here])
    while len(count) > 1:
        half = len(count) // 2
        both = (count[:half] + count[half:]).clamp(min=1)
        delta = mean[half:] - mean[:half]
        m2 = m2[:half] + m2[half:] + delta.square() * (count[:half] * count[half:] / both)
        mean = mean[:half] + delta * (count[half:] / both)
        count = count[:half] + count[half:]
    return mean[0], m2[0]


def _in_float32(
    given: dict[str, Tensor], *, training: bool = True, relu: bool = True,
    per_sample: bool = False, without: tuple[str, ...] = (),
) -> Run:  # fmt: skip
    """Return what the definition gives where every step is rounded to float32."""
    shape, channels = given["x"].shape, given["x"].shape[1]
    x, dy = (given[n].float().reshape(shape[0], channels, -1).transpose(1, 2) for n in ("x", "dy"))
    weight, bias = (torch.full((channels,), other) if name in without else given[name].float()
                    for name, other in (("weight", 1.0), ("bias", 0.0)))  # fmt: skip
    active = slice(None) if "active" in without else given["active"]
    running = {n: given[n].float().clone() for n in NAMES[3:5] if n not in without}
    count = x[..., 0].numel()
    if training:
        mean, m2 = _moments(x.reshape(count, -1))
        var = m2 / count
        for name, value in zip(running, (mean, m2 / (count - 1)), strict=False):
            running[name][active] = 0.7 * running[name][active] + 0.3 * value
    else:
        mean, var = (value[active] for value in running.values())
    invstd = 1 / (var + 1e-3).sqrt()
    scale = invstd * weight
    h = (x - mean) * scale + bias
    dh = torch.where(h > 0, dy, 0.0) if relu else dy
    of_samples = [_add(terms.transpose(0, 1)) for terms in (dh * (x - mean), dh)]
    by_x, dbias = (_add(terms.reshape(count, -1)) for terms in (dh * (x - mean), dh))
    dweight = by_x * invstd
    dx = dh * scale
    if training:
        dx = dx - (x - mean) * (scale * invstd * dweight / count) - scale * dbias / count
    saliency = weight * dweight + bias * dbias
    if per_sample:
        saliency = of_samples[0] * scale + of_samples[1] * bias
    y = h.relu() if relu else h
    y, dx = (t.transpose(1, 2).reshape(shape) for t in (y, dx))
    results = (y, mean, invstd, *running.values(), dx, dweight, dbias, saliency)
    names = [name for name in NAMES if name not in NAMES[3:5] or name in running]
    return dict(zip(names, results, strict=True))


def compare(
    given: dict[str, Tensor], forms: tuple[str, str] = ("first", "first"), **options: Any
) -> Run:
    actual = run(batch_norm, given, forms, **options)
    truth = oracle(given, torch.float64, **options)
    # of half precision torch's error is that of rounding what float32 gives
    same = oracle(given, torch.float32, **options)
    top = torch.tensor(torch.inf)
    near = {n: t.float().nextafter(top).nextafter(top) for n, t in truth.items()}
    for other in (near, *(_in_float32(given, **options) for _ in range(6))):
        for name, value in other.items():  # one order's error may be none by chance
            assert torch.allclose(value, truth[name].float(), rtol=1e-4, atol=1e-4), name
            further = (value - truth[name]).abs() > (same[name] - truth[name]).abs()
            same[name] = torch.where(further, value, same[name])
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        inputs = {"y": "x", "dx": "x", "running_mean": name, "running_var": name}
        dtype = given[inputs[name]].dtype if name in inputs else torch.float32
        assert_close_to_float64(value, same[name].to(dtype), truth[name], name)
    return actual

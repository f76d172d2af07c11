"""Every kernel once, small, and two networks for a step: what compute-sanitizer looks at.

Inputs are made on the host and results compared there, so that on the device next to nothing runs
but the kernels. Argument lists come from the host too: their lists and shapes are odd on purpose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dcx_kernels as dcx
from benchmarks.arms import HYPER
from benchmarks.gpu import require_gpu
from benchmarks.gpu_cases import backend_of
from benchmarks.harness import environment_set
from benchmarks.problem import Problem, SetStream, Structure
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.slices import Slice

__all__ = ["CALLS", "main", "smoke_kernels", "smoke_networks"]

_TOLERANCE = 0.05  # of norms, in bfloat16: this looks for accidents, tests look at digits
_SHAPES = ((1, 3), (3, 1), (17, 20), (33, 64))


def main(argv: Sequence[str] | None = None) -> None:
    """Run all of it; raise on a result that is far off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--networks", action="store_true", help="train two networks as well")
    o = parser.parse_args(argv)
    if o.device == "cuda":
        require_gpu("benchmarks.gpu_smoke")
    count = smoke_kernels(o.device)
    if o.networks:
        smoke_networks(o.device)
    print(f"{count} kernel calls right")


def smoke_kernels(device: str, kernels: ModuleType | None = None) -> int:
    """Call every kernel of the device's backend on small tensors; return how many calls.

    Args:
        device: "cuda", or "cpu" for a dry run.
        kernels: another backend.

    Raises:
        AssertionError: if a result is far from the reference in float64.
    """
    count = 0
    for form in (torch.channels_last, torch.contiguous_format):
        for k, c in _SHAPES:
            for name, make in CALLS.items():
                function = getattr(kernels or backend_of(device), name)
                exactly = getattr(backend_of("cpu", "reference"), name)
                arguments = make(k, c, form)
                exact = _flat(exactly(*_moved(arguments, "cpu", torch.float64)))
                with environment_set({"DCX_CONV": "own"}):
                    actual = _flat(function(*_moved(arguments, device, torch.bfloat16)))
                for a, b in zip(actual, exact, strict=True):
                    error = float(torch.linalg.vector_norm(a.cpu().double() - b.double()))
                    bound = _TOLERANCE * float(torch.linalg.vector_norm(b.double())) + _TOLERANCE
                    if not error <= bound:
                        raise AssertionError(
                            f"{name} k={k} c={c} {form}: {error:.2e} > {bound:.2e}"
                        )
                count += 1
    return count


def smoke_networks(device: str) -> None:
    """Train small networks for two steps under autocast: sums of unions, norms, the optimizer.

    Raises:
        AssertionError: if the loss is not finite.
    """
    for name, residual in (("vgg19", "keep"), ("resnet32", "union")):
        problem = Problem(
            name, 3, 0.5, "NHWC", 0.25, residual=residual, device=device, dtype="bfloat16",
            grid="odd",
        )  # type: ignore[arg-type]  # fmt: skip
        model = problem.converted("sparse", "batch")
        stream = SetStream(Structure.of(model), 0.5, varying=True, seed=1, grid="odd")
        optimizer = dcx.optim.SGD(model, **HYPER)
        images, labels = problem.data()
        for _ in range(2):
            model.set_active(stream.fresh())
            optimizer.zero_grad()
            with problem.autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        if not bool(loss.isfinite()):
            raise AssertionError(f"{name}: expected a finite loss")


def _image(k: int, form: torch.memory_format, extent: int = 7) -> Tensor:
    return torch.randn(2, k, extent, extent).contiguous(memory_format=form)


def _conv(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    full, out, into = _slice(k, c, 3)
    return full, out, into, [2, 2], [1, 1], [1, 1]


def _slice(k: int, c: int, filter_: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a full weight and sorted lists of k of its 2 k + 1 and c of its 2 c + 1 channels."""
    out, into = (torch.arange(1, 2 * n + 1, 2) for n in (k, c))
    return torch.randn(2 * k + 1, 2 * c + 1, filter_, filter_), out, into


def _fwd(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    full, out, into, *window = _conv(k, c, form)
    return _image(c, form), full, torch.randn(2 * k + 1), into, out, *window, 1, 1


def _dgrad(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    full, out, into, *window = _conv(k, c, form)
    return _image(k, form, 4), _image(c, form), full, into, out, *window, 1, 1


def _wgrad(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    window = _conv(k, c, form)[3:]
    return _image(k, form, 4), _image(c, form), [3, 3], *window, 1


def _norm_fwd(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    active = torch.arange(1, 2 * k + 1, 2)
    stats = torch.zeros(2 * k + 1), torch.ones(2 * k + 1)
    return _image(k, form), torch.rand(k), torch.rand(k), *stats, active, True, 0.1, 1e-5, True


def _norm_bwd(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    x, w, b = _image(k, form), torch.rand(k), torch.rand(k)
    over = x.double().transpose(0, 1).flatten(1)
    mean, invstd = over.mean(1).float(), over.var(1, correction=0).add(1e-5).rsqrt().float()
    y = F.batch_norm(x, None, None, w, b, True).relu().contiguous(memory_format=form)
    return _image(k, form), x, y, w, b, mean, invstd, True, 1e-5, False


def _union(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    # every channel of k + c is in one of the terms, the last in both
    a, b = torch.arange(k + c)[c:], torch.cat([torch.arange(c), torch.tensor([k + c - 1])])
    return _image(k, form), _image(c + 1, form), a, b, k + c


def _gather(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    full, out, into = _slice(k, c, 3)
    return [full, torch.randn(2 * k + 1)], [(full.shape, out, into), ((2 * k + 1,), out, None)]


def _norm(channels: int) -> Norm:
    return Norm(torch.rand(channels), torch.rand(channels), torch.rand(channels))


def _fused_fwd(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    x, *rest = _fwd(k, c, form)
    return x, _norm(c), *rest, True


def _fused_dgrad(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    dy, x, *rest = _dgrad(k, c, form)
    return dy, _norm_grad(dy), x, _norm(c), *rest, False


def _fused_wgrad(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    dy, x, *rest = _wgrad(k, c, form)
    return dy, _norm_grad(dy), x, _norm(c), *rest


def _norm_grad(dy: Tensor) -> NormGrad:
    norm, (slope, offset, _) = _norm(dy.shape[1]), _norm(dy.shape[1])
    return NormGrad(torch.randn_like(dy), norm.center, slope, offset, norm, True)


def _lists(k: int, c: int) -> tuple[Tensor, Tensor]:
    """Return c of 2 c + 1 and k of 2 k + 1 channels, others for each of two samples."""
    pairs = (torch.stack([torch.arange(n), torch.arange(n) + n + 1]) for n in (c, k))
    return next(pairs), next(pairs)


def _sample_fwd(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    x, full, bias, _, _, *window, _, _ = _fwd(k, c, form)
    return x, full, bias, *_lists(k, c), *window


def _sample_dgrad(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    dy, x, full, _, _, *window, _, _ = _dgrad(k, c, form)
    return dy, x, full, *_lists(k, c), *window


def _sample_wgrad(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    dy, x, full, _, _, *window, _, _ = _dgrad(k, c, form)
    return dy, x, list(full.shape), *_lists(k, c), *window


def _channels(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    return _image(2 * k + 1, form), torch.arange(1, 2 * k + 1, 2), 1


def _places(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    return _image(k, form), torch.arange(1, 2 * k + 1, 2), 1, 2 * k + 1


def _select(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    return torch.randint(5, (k + c,)).float(), [k, c], k + c - 1, 1


def _winners(k: int, c: int, form: torch.memory_format) -> tuple[Any, ...]:
    return torch.randint(5, (2, k + c)).float(), c


# function of a backend -> its arguments for k outputs and c inputs
CALLS: dict[str, Callable[[int, int, torch.memory_format], tuple[Any, ...]]] = {
    "channel_conv2d_fwd": _fwd,
    "channel_conv2d_dgrad": _dgrad,
    "channel_conv2d_wgrad": _wgrad,
    "fused_conv2d_fwd": _fused_fwd,
    "fused_conv2d_dgrad": _fused_dgrad,
    "fused_conv2d_wgrad": _fused_wgrad,
    "sample_conv2d_fwd": _sample_fwd,
    "sample_conv2d_dgrad": _sample_dgrad,
    "sample_conv2d_wgrad": _sample_wgrad,
    "channel_batch_norm_fwd": _norm_fwd,
    "channel_batch_norm_bwd": _norm_bwd,
    "union_add": _union,
    "gather": _channels,
    "scatter": _places,
    "gather_slices": _gather,
    "select_channels": _select,
    "k_winners": _winners,
}


def _moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Give images and filters the dtype, vectors at least float32; make slices where they are."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            wide = torch.promote_types(dtype, torch.float32)
            value = value.to(torch.bfloat16).to(dtype) if value.dim() == 4 else value.to(wide)
        return value.to(device)
    if isinstance(value, (Norm, NormGrad)):
        return type(value)(*(_moved(part, device, dtype) for part in value))
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):  # shape and lists
        return Slice(value[0], *_moved(list(value[1:]), device, dtype))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_moved(part, device, dtype) for part in value)
    return value


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

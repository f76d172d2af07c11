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
from benchmarks.problem import Problem, SetStream, Structure
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
                find = backend_of
                function = getattr(kernels or find(device), name)
                exactly = getattr(find("cpu", "reference"), name)
                arguments = make(k, c, form)
                exact = _flat(exactly(*_moved(arguments, "cpu", torch.float64)))
                actual = _flat(function(*_moved(arguments, device, torch.bfloat16)))
                for a, b in zip(actual, exact, strict=True):
                    error = float(torch.linalg.vector_norm(a.cpu().double() - b))
                    bound = _TOLERANCE * float(torch.linalg.vector_norm(b)) + _TOLERANCE
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


# function of a backend -> its arguments for k outputs and c inputs
CALLS: dict[str, Callable[[int, int, torch.memory_format], tuple[Any, ...]]] = {
    "channel_conv2d_fwd": _fwd,
    "channel_conv2d_dgrad": _dgrad,
    "channel_conv2d_wgrad": _wgrad,
    "channel_batch_norm_fwd": _norm_fwd,
    "channel_batch_norm_bwd": _norm_bwd,
    "union_add": _union,
    "gather_slices": _gather,
}


def _moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Give images and filters the dtype, vectors at least float32; make slices where they are."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            wide = torch.promote_types(dtype, torch.float32)
            value = value.to(torch.bfloat16).to(dtype) if value.dim() == 4 else value.to(wide)
        return value.to(device)
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[1], Tensor):
        return Slice(value[0], *_moved(list(value[1:]), device, dtype))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_moved(part, device, dtype) for part in value)
    return value


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

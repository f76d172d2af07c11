"""How kernels are declared and launched.

Widths change every step, so that no kernel may be compiled for the value of a width: extents and
strides are plain run-time arguments, of which Triton is told to note neither 1 nor divisibility.
What does make a variant is written as a ``tl.constexpr`` flag, and those are few and countable.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "aligned", "cdiv", "kernel", "on", "serves", "unless_float64"]

F = TypeVar("F", bound=Callable[..., Any])

INTERPRETED = bool(triton.knobs.runtime.interpret)


def kernel(*aligned: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel: `triton.jit` without variants for the values of its arguments.

    Args:
        aligned: pointers that the launcher passes through `aligned`: 16-byte accesses need it.
    """

    def declare(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        run_time = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
        plain = [name for name in run_time if name not in aligned]
        return triton.jit(function, do_not_specialize=plain)

    return declare


def aligned(x: Tensor) -> Tensor:
    """Return the tensor, or a copy if it does not begin at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def cdiv(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def serves(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU, or on a CPU under Triton's interpreter."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which launches go to the device of ``x``."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def unless_float64(own: F, exact: F) -> F:
    """Return ``own`` with ``exact`` in its place where the first operand is float64.

    No GPU that trains networks is fast at it, and kernels compute in fp32.
    """

    @functools.wraps(own)
    def run(x: Tensor, *args: Any) -> Any:
        return (exact if x.dtype == torch.float64 else own)(x, *args)

    return cast(F, run)

"""Which backend runs an operator: one visible rule, the only place that looks for backends."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from dcx_kernels._env import backend_override
from dcx_kernels.errors import expected
from dcx_kernels.kernels import reference

__all__ = ["BackendStatus", "choose", "describe"]

_NAMES = ("reference", "triton")
_OLDEST = (8, 0)  # compute capability: bfloat16 and TF32 on tensor cores


class BackendStatus(NamedTuple):
    """One row of `describe`."""

    name: str
    available: bool
    reason: str


def choose(device: torch.device) -> ModuleType:
    """Return the backend that serves ``device``: the rule of `describe`, or ``DCX_BACKEND``.

    Raises:
        ValueError: if ``DCX_BACKEND`` names a backend that is not there, or not for this device.
    """
    name = backend_override()
    if name is None:
        triton = _triton() if device.type == "cuda" and _recent(device.index) else None
        return triton if isinstance(triton, ModuleType) else reference
    if name == "reference":
        return reference
    if name != "triton":
        raise ValueError(expected(f"DCX_BACKEND to be one of {sorted(_NAMES)}", repr(name)))
    triton = _triton()
    if isinstance(triton, str):
        raise ValueError(expected("Triton, for DCX_BACKEND=triton", triton))
    if not triton.serves(device):
        what = "a GPU (or a CPU and TRITON_INTERPRET=1) for DCX_BACKEND=triton"
        raise ValueError(expected(what, str(device)))
    return triton


def describe() -> list[BackendStatus]:
    """List every backend with whether it is available and why."""
    triton = _triton()
    if isinstance(triton, str):
        status = BackendStatus("triton", False, triton)
    else:
        from dcx_kernels.kernels.triton import choice

        on = (
            "the interpreter, on CPUs" if triton.INTERPRETED else "GPUs of capability 8.0 and later"
        )
        status = BackendStatus("triton", True, f"{on}. Convolutions: {choice.SOURCE}")
    return [
        BackendStatus("reference", True, "ATen on any device: the definition, chosen on CPUs"),
        status,
        BackendStatus("native", False, "not part of this version"),
    ]


@functools.cache
def _triton() -> ModuleType | str:
    """Return the backend, or why it is not there."""
    try:
        from dcx_kernels.kernels import triton
    except ImportError as error:
        return f"not installed ({error})"
    return triton


@functools.cache
def _recent(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= _OLDEST

"""Which backend runs an operator: one visible rule, the only place that looks for backends.

CPUs: native where its library is built, else the reference. GPUs: Triton, from compute capability
8.0 on, else the reference; native on request (nobody has measured it against Triton yet).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from dcx_kernels._env import backend_override
from dcx_kernels.errors import expected
from dcx_kernels.kernels import reference

__all__ = ["BackendStatus", "choose", "describe"]

_NAMES = ("native", "reference", "triton")
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
    if name is not None:
        return _forced(name, device)
    found: ModuleType | str = "no backend of its own"
    if device.type == "cpu":
        found = _native("cpu")
    elif device.type == "cuda" and _recent(device.index):
        found = _triton()
    return found if isinstance(found, ModuleType) else reference


def describe() -> list[BackendStatus]:
    """List every backend with whether it is available and why."""
    triton, cpu, cuda = _triton(), _native("cpu"), _native("cuda")
    if isinstance(triton, str):
        status = BackendStatus("triton", False, triton)
    else:
        from dcx_kernels.kernels.triton import choice

        on = (
            "the interpreter, on CPUs" if triton.INTERPRETED else "GPUs of capability 8.0 and later"
        )
        status = BackendStatus("triton", True, f"{on}. Convolutions: {choice.SOURCE}")
    return [
        BackendStatus("reference", True, "ATen on any device: the definition and the fallback"),
        status,
        _status("native (CPU)", cpu, "chosen on CPUs"),
        _status("native (CUDA)", cuda, "on request: DCX_BACKEND=native"),
    ]


def _forced(name: str, device: torch.device) -> ModuleType:
    if name not in _NAMES:
        raise ValueError(expected(f"DCX_BACKEND to be one of {sorted(_NAMES)}", repr(name)))
    if name == "reference":
        return reference
    if name == "native":
        native = _native(device.type)
        if isinstance(native, str):
            raise ValueError(expected("its library, for DCX_BACKEND=native", native))
        return native
    triton = _triton()
    if isinstance(triton, str):
        raise ValueError(expected("Triton, for DCX_BACKEND=triton", triton))
    if not triton.serves(device):
        what = "a GPU (or a CPU and TRITON_INTERPRET=1) for DCX_BACKEND=triton"
        raise ValueError(expected(what, str(device)))
    return triton


def _status(name: str, found: ModuleType | str, reason: str) -> BackendStatus:
    if isinstance(found, str):
        return BackendStatus(name, False, found)
    return BackendStatus(name, True, reason)


@functools.cache
def _triton() -> ModuleType | str:
    """Return the backend, or why it is not there."""
    try:
        from dcx_kernels.kernels import triton
    except ImportError as error:
        return f"not installed ({error})"
    return triton


@functools.cache
def _native(device: str) -> ModuleType | str:
    """Return the native backend of a type of device, or why it is not there."""
    from dcx_kernels.kernels import native

    if device not in ("cpu", "cuda"):
        return f"not for {device}"
    lacking = native.load(device)
    if lacking is not None:
        return lacking
    own: ModuleType
    if device == "cpu":
        from dcx_kernels.kernels.native import cpu

        own = cpu
    else:
        from dcx_kernels.kernels.native import cuda

        own = cuda
    lost = [name for name in own.OPERATORS if not hasattr(torch.ops.dcx_native, name)]
    if lost:
        return f"built from other sources than this package, without {lost[0]}. {native.AGAIN}"
    return own


@functools.cache
def _recent(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= _OLDEST

"""Which backend runs an operator: one visible rule, the only place that looks for backends."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from dcx_kernels._env import backend_override
from dcx_kernels.errors import expected
from dcx_kernels.kernels import reference

__all__ = ["BackendStatus", "choose", "describe"]

_BACKENDS: dict[str, ModuleType] = {"reference": reference}


class BackendStatus(NamedTuple):
    """One row of `describe`."""

    name: str
    available: bool
    reason: str


def choose(device: torch.device) -> ModuleType:
    """Return the backend that serves ``device``: the reference, or what ``DCX_BACKEND`` says.

    Raises:
        ValueError: if ``DCX_BACKEND`` names a backend that is not there.
    """
    name = backend_override()
    if name is None:
        return reference
    if name not in _BACKENDS:
        raise ValueError(expected(f"DCX_BACKEND to be one of {sorted(_BACKENDS)}", repr(name)))
    return _BACKENDS[name]


def describe() -> list[BackendStatus]:
    """List every backend with whether it is available and why."""
    return [
        BackendStatus("reference", True, "ATen on any device: the definition, chosen everywhere"),
        BackendStatus("triton", False, "not part of this version"),
        BackendStatus("native", False, "not part of this version"),
    ]

"""Which machine and which versions a number was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

__all__ = ["describe_device", "describe_machine", "versions"]

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "safetensors",
    "scikit-learn",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def versions() -> dict[str, str]:
    """Return the versions of python and of the packages that matter; "not installed" if absent."""
    from dcx_kernels import __version__  # not at the top: the package imports this layer

    found = {"dcx_kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch built for CUDA"] = torch.version.cuda or "no"
    return found


def describe_machine() -> dict[str, str]:
    """Return operating system, processor, its instruction set, cores and torch's threads."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def describe_device(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device}: {torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    return f"{device}: {_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"

"""What every GPU benchmark needs: the GPU by name, and what it reaches at best."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import Environment, current_environment
from benchmarks.gpu_timer import CudaTimer, HostTimer, Timer

__all__ = ["Ceilings", "GpuKey", "current_key", "make_timer", "require_gpu"]


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, measured in this run.

    Args:
        copy_gb_per_s: bytes read and written by a large copy.
        matmul_tflop_per_s: of a large square matrix product in the dtype that is measured.
    """

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def bound_us(self, macs: int, moved: int) -> float:
        """Return the least time for so many multiply-accumulates and bytes."""
        return max(2e-6 * macs / self.matmul_tflop_per_s, 1e-3 * moved / self.copy_gb_per_s)

    @classmethod
    def measure(cls, timer: Timer, device: str, dtype: torch.dtype, tiny: bool) -> Ceilings:
        """Measure both, on random numbers: zeros are faster."""
        size, side = (1 << 18, 64) if tiny else (1 << 29, 8192)
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        calls: list[Callable[[], Tensor]] = [lambda: target.copy_(source), lambda: a @ b]
        copy, matmul = timer.time(calls, rounds=20, warmup=5)
        return cls(2e-3 * size / copy.median, 2e-6 * side**3 / matmul.median)


@dataclass(frozen=True)
class GpuKey:
    """What a row of a GPU benchmark starts with, besides `Environment`."""

    environment: Environment
    gpu: str
    cuda: str
    driver: str
    triton: str

    def columns(self) -> dict[str, Any]:
        """Return the columns by name."""
        own = {name: getattr(self, name) for name in ("gpu", "cuda", "driver", "triton")}
        return {**asdict(self.environment), **own}


def current_key(device: str, commit: str = "") -> GpuKey:
    """Describe this machine, now.

    Args:
        device: "cuda", or "cpu" for a dry run.
        commit: of a checkout whose history stayed elsewhere.
    """
    environment = current_environment()
    if commit and environment.commit == "unknown":
        environment = replace(environment, commit=commit, dirty=False)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    on_gpu = device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "none, a dry run"
    driver = _driver() if on_gpu else "none"
    return GpuKey(environment, name, torch.version.cuda or "none", driver, triton)


def make_timer(device: str) -> Timer:
    """Return the timer of a device."""
    return CudaTimer() if device == "cuda" else HostTimer()


def require_gpu(what: str) -> None:
    """Leave, with a sentence, where there is no GPU.

    Raises:
        SystemExit: then.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"{what} needs an NVIDIA GPU, and torch {torch.__version__} finds none.")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]

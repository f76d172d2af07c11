"""What a number was measured with: the key that every row of a results file starts with."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import dcx_kernels
from dcx_kernels.kernels.backend import choose
from dcx_kernels.train.machine import describe_machine, versions

__all__ = ["ROOT", "Environment", "current_environment"]

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("dcx_kernels", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")


@dataclass(frozen=True)
class Environment:
    """Machine, versions and commit. No host name and no path: results are published.

    Args:
        backend: of the channel operators, as chosen for the device: see `dcx info`.
        dirty: whether the sources differ from the commit.
    """

    cpu: str
    instructions: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    dcx_kernels: str
    backend: str
    commit: str
    dirty: bool
    date: str


def current_environment() -> Environment:
    """Describe this machine and this checkout, now."""
    machine, installed = describe_machine(), versions()
    commit = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--", *_SOURCES)
    return Environment(
        cpu=machine["processor"],
        instructions=machine["instructions"],
        cores=int(machine["cores"]),
        threads=int(machine["threads"]),
        system=f"{platform.system()} {platform.machine()}",
        python=installed["python"],
        torch=installed["torch"],
        dcx_kernels=dcx_kernels.__version__,
        backend=choose(torch.device("cuda" if torch.cuda.is_available() else "cpu")).NAME,
        commit=commit or "unknown",
        dirty=changes != "",
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

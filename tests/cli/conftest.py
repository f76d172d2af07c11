"""A data file, and ``dcx`` run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = ["--width", "0.0625", "--density", "0.5", "--batch-size", "16", "--lr", "0.05"]
TINY = [*SIZE, "--procedure", "two-stage"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 24 test images of 32x32 that show their label."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    arrays = {}
    for split, number in (("train", 64), ("test", 24)):
        labels = np.arange(number) % 4
        noise = generator.integers(0, 100, (number, 32, 32, 3))
        arrays[f"{split}_images"] = (noise + 50 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
    return path


@pytest.fixture
def arguments(data_file: Path) -> Callable[..., list[str]]:
    """Return the arguments of a training that takes seconds."""

    def build(out: Path, *more: str) -> list[str]:
        base = ["train", "--data", str(data_file), "--out", str(out), "--threads", "1", *TINY]
        return [*base, *more]

    return build


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start ``dcx`` as a process; whatever still runs when the test is over is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(arguments: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dcx_kernels.cli", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()

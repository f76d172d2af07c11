"""A data file and settings that train in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dcx_kernels.recipes import DCEConfig, Experiment


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
def experiment(data_file: Path) -> Experiment:
    return Experiment(data=str(data_file), width=1 / 16, compare=("mask", "dense"))


@pytest.fixture
def config() -> DCEConfig:
    return DCEConfig(density=0.5, epochs=2, batch_size=16, lr=0.05, recalibrate_batches=3)

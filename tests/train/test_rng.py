"""All generators continue where they were."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from dcx_kernels.train import checkpoint, rng


def _draw() -> list[float]:
    # an odd number of normals: numpy and python keep the second one of a pair
    normal = [np.random.normal(), random.gauss(0, 1)]  # noqa: NPY002
    return [*normal, torch.rand(1).item(), torch.randn(1).item(), random.random()]


def test_rng_state_survives_a_checkpoint(tmp_path: Path) -> None:
    _draw()
    checkpoint.save(tmp_path / "c", rng.capture())
    wanted = [_draw(), _draw()]
    _draw()
    rng.restore(checkpoint.load(tmp_path / "c"))
    assert [_draw(), _draw()] == wanted

"""Kernels run on a GPU where there is one, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device() -> torch.device:
    """Return the device that Triton's kernels run on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Normalisation per group: eq. 3 of DCE, eq. 8 of DCP."""

from __future__ import annotations

import pytest
import torch

from dcx_kernels.selectors.normalize import l2_normalize, max_normalize

SALIENCY = torch.tensor([3.0, 4.0, 0.0, 0.0, 5.0], dtype=torch.float64)
SEGMENTS = torch.tensor([0, 0, 1, 1, 2])


def test_l2_normalize_by_hand():
    got = l2_normalize(SALIENCY, SEGMENTS, 3)
    assert got.tolist() == pytest.approx([0.6, 0.8, 0.0, 0.0, 1.0], abs=1e-15)


def test_max_normalize_by_hand():
    assert max_normalize(SALIENCY, SEGMENTS, 3).tolist() == [0.75, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("scale", [1e-200, 1e200, 5e-324])
def test_l2_normalize_neither_vanishes_nor_overflows(scale):
    got = l2_normalize(torch.full((2,), scale, dtype=torch.float64), torch.zeros(2).long(), 1)
    assert got.tolist() == pytest.approx([0.5**0.5] * 2)

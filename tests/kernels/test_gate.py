"""The reference of the per-sample gate against sorting written out, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from channel_helpers import spread
from dcx_kernels.kernels.reference.gate import k_winners
from tolerances import assert_exact, assert_reruns_equal

INF, NAN = float("inf"), float("nan")


def by_sorting(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort each sample by falling value, then by channel."""
    chosen = []
    for row in g.tolist():
        numbers = [-INF if math.isnan(value) else value for value in row]
        chosen.append(sorted(sorted(range(len(row)), key=lambda c, v=numbers: (-v[c], c))[:k]))
    indices = torch.tensor(chosen, dtype=torch.int64).view(g.shape[0], k)
    return indices, torch.stack([row[c] for row, c in zip(g, indices, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "k"), [(1, 1), (3, 2), (17, 17), (63, 1), (100, 50)])
def test_k_winners_equal_sorting(channels: int, k: int, dtype: torch.dtype) -> None:
    g = torch.randn(5, channels).relu().to(dtype)  # half of them are 0: ties
    for x in (g, spread(g), g.t().contiguous().t()):
        for got, wanted in zip(k_winners(x, k), by_sorting(g, k), strict=True):
            assert_exact(got, wanted)


def test_k_winners_by_hand() -> None:
    g = torch.tensor([[1, 3, 3, 2], [0, 0, 0, 0], [NAN, -INF, INF, NAN], [-0.0, 0.0, -1, -0.0]])
    indices, values = k_winners(g, 2)
    assert_exact(indices, torch.tensor([[1, 2], [0, 1], [0, 2], [0, 1]]))
    assert_exact(values, torch.tensor([[3.0, 3.0], [0.0, 0.0], [NAN, INF], [-0.0, 0.0]]))


def test_k_winners_of_no_samples() -> None:
    indices, values = k_winners(torch.empty(0, 4, dtype=torch.float16), 3)
    assert indices.shape == values.shape == (0, 3)
    assert (indices.dtype, values.dtype) == (torch.int64, torch.float16)


def test_k_winners_reruns_are_equal_and_spare_g() -> None:
    g = torch.randint(0, 5, (4, 100)).float()
    g[1, 7] = NAN
    before = g.clone()
    assert_reruns_equal(lambda: k_winners(g, 41))
    assert_exact(g, before)

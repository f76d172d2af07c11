"""The global top-k's kernels against the selectors' ranking; the reference where NaN is allowed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.reference import selection as reference
from dcx_kernels.kernels.triton.selection import select_channels
from dcx_kernels.selectors import global_top
from tolerances import assert_exact, assert_reruns_equal

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill outputs with what no index is, before they are written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def between_infinities(scores: Tensor, device: torch.device) -> Tensor:
    """Return the scores as a view; who reads beside them finds the best of all."""
    wide = scores.new_full((scores.shape[0] + 8,), INF)
    wide[3:-5] = scores
    return wide.to(device)[3:-5]


def check(scores: Tensor, sizes: Sequence[int], budget: int, least: int, on: torch.device) -> None:
    """Compare with the sets of the selectors, group by group."""
    found = select_channels(between_infinities(scores, on), sizes, budget, least)
    indices, inverse, counts = (t.cpu() for t in found)
    parts = {str(i): part for i, part in enumerate(scores.split(list(sizes)))}
    sets = [s.indices for s in global_top(parts, budget, least).values()]
    assert_exact(counts, torch.tensor([len(s) for s in sets]))
    wanted_indices, wanted_inverse = torch.full_like(indices, -1), torch.full_like(inverse, -1)
    for listed, place, chosen in zip(
        wanted_indices.split(list(sizes)), wanted_inverse.split(list(sizes)), sets, strict=True
    ):
        listed[: len(chosen)] = chosen
        place[chosen] = torch.arange(len(chosen))
    assert_exact(indices, wanted_indices)
    assert_exact(inverse, wanted_inverse)


SIZES = {
    "one-channel": [1],
    "one-group": [17],
    "odd": [3, 17, 63, 1],
    "ones": [1] * 5,
    "blocks": [1030, 3, 3100, 1024],  # more than a block of a group, and of all
}
VALUES = {
    "random": lambda n: torch.randn(n, dtype=torch.float64),
    "ties": lambda n: torch.randint(-2, 3, (n,)).double(),
    "same": lambda n: torch.full((n,), -1.5, dtype=torch.float64),
    "zeros": lambda n: torch.where(torch.rand(n) < 0.5, -0.0, 0.0).double(),
    "infinities": lambda n: torch.tensor([-INF, 1.0, INF]).double()[torch.randint(3, (n,))],
    # equal in their first 32 bits, and float32 cannot tell them apart
    "close": lambda n: 1 + torch.randint(0, 400, (n,)).double() * 2.0**-50,
    "tiny": lambda n: torch.randint(-300, 300, (n,)).double() * 2.0**-149,
}


CASES = [(sizes, "ties") for sizes in SIZES] + [("odd", v) for v in VALUES if v != "ties"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("min_active", [1, 5])
@pytest.mark.parametrize(("sizes", "values"), CASES, ids=["-".join(case) for case in CASES])
def test_select_channels_equals_the_ranking(
    sizes: str, values: str, min_active: int, dtype: torch.dtype, device: torch.device
) -> None:
    total = sum(SIZES[sizes])
    floor = sum(min(min_active, size) for size in SIZES[sizes])
    scores = VALUES[values](total).to(dtype)
    check(scores, SIZES[sizes], floor + (total - floor) // 2, min_active, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_select_channels_equals_the_ranking_at_random(
    dtype: torch.dtype, device: torch.device
) -> None:
    rng = random.Random(0)
    for _ in range(3):
        sizes = [rng.choice([1, 2, 7, 20]) for _ in range(rng.randint(1, 5))]
        min_active = rng.randint(1, 8)
        floor = sum(min(min_active, size) for size in sizes)
        scores = torch.randint(0, rng.choice([2, 9, 99]), (sum(sizes),)).to(dtype)
        check(scores, sizes, rng.randint(floor, sum(sizes)), min_active, device)


@pytest.mark.parametrize("share", ["least", "all"])
@pytest.mark.parametrize("min_active", [1, 99])
def test_select_channels_at_the_ends_of_the_budget(
    share: str, min_active: int, device: torch.device
) -> None:
    sizes = [5, 1, 30]
    floor = sum(min(min_active, size) for size in sizes)
    check(torch.randn(36), sizes, floor if share == "least" else 36, min_active, device)


def test_select_channels_forces_the_worst_group_in(device: torch.device) -> None:
    scores = torch.cat([torch.full((20,), INF), torch.full((9,), -INF), torch.zeros(9)])
    check(scores, [20, 9, 9], 12, 2, device)
    check(scores, [20, 9, 9], 15, 5, device)


def test_select_channels_forces_no_more_than_the_least(device: torch.device) -> None:
    check(torch.zeros(4130), [1030, 3100], 10, 5, device)  # ties in several blocks


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_select_channels_takes_nan_as_minus_infinity(
    dtype: torch.dtype, device: torch.device
) -> None:
    scores = torch.tensor([NAN, -INF, NAN, 1, -NAN, INF, NAN, NAN, -1, -INF], dtype=dtype)
    for budget in (3, 6, 9):
        arguments = [4, 3, 3], budget, 1
        wanted = reference.select_channels(scores, *arguments)
        for got, truth in zip(select_channels(scores.to(device), *arguments), wanted, strict=True):
            assert_exact(got.cpu(), truth)


def test_select_channels_reads_strided_scores(device: torch.device) -> None:
    scores = torch.stack([torch.randn(20), torch.full((20,), INF)], 1).to(device)[:, 0]
    wanted = reference.select_channels(scores.cpu(), [9, 11], 7, 1)
    for got, truth in zip(select_channels(scores, [9, 11], 7, 1), wanted, strict=True):
        assert_exact(got.cpu(), truth)


def test_select_channels_reruns_are_equal_and_spare_the_scores(device: torch.device) -> None:
    scores = torch.randint(0, 5, (100,)).float().to(device)
    before = scores.clone()
    assert_reruns_equal(lambda: select_channels(scores, [60, 3, 37], 41, 2))
    assert_exact(scores, before)

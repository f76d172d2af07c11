"""The global top-k on the emulated GPU against the ranking of selectors, and the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.native.cuda import selection
from dcx_kernels.kernels.reference import selection as reference
from dcx_kernels.selectors import global_top
from tolerances import assert_exact, assert_reruns_equal

INF, NAN = float("inf"), float("nan")
_POISON = -7


@pytest.fixture(autouse=True)
def launches(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the operator of the library emulated; outputs hold what no index is before."""
    called: list[str] = []

    def select(
        scores: Tensor, bounds: Tensor, budget: int, min_active: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        called.append("select_channels")
        assert scores.is_contiguous()
        total, groups = len(scores), len(bounds) - 1
        kept = scores.clone()
        keys = torch.full((8 * total,), 0xA5, dtype=torch.uint8)
        limit = torch.full((2,), _POISON)
        made = [torch.full((n + 4,), _POISON) for n in (total, total, groups)]
        emulated.select_channels(
            scores.data_ptr(), bounds.data_ptr(), keys.data_ptr(), limit.data_ptr(),
            *(out[2:-2].data_ptr() for out in made), total, groups, budget, min_active,
            scores.dtype is torch.float64,
        )  # fmt: skip
        assert_exact(scores, kept)
        for out in made:
            assert out[:2].tolist() == out[-2:].tolist() == [_POISON] * 2
        assert (keys[total * scores.element_size() :] == 0xA5).all()
        indices, inverse, counts = (out[2:-2] for out in made)
        return indices, inverse, counts

    monkeypatch.setattr(torch.ops, "dcx_native", SimpleNamespace(select_channels=select))
    monkeypatch.setattr(selection, "_serves", lambda device: True)
    return called


def between_infinities(scores: Tensor) -> Tensor:
    """Return the scores as a view; who reads beside them finds the best of all."""
    wide = scores.new_full((scores.shape[0] + 8,), INF)
    wide[3:-5] = scores
    return wide[3:-5]


def check(scores: Tensor, sizes: Sequence[int], budget: int, least: int) -> None:
    """Compare with the sets of the selectors, group by group."""
    indices, inverse, counts = selection.select_channels(
        between_infinities(scores), sizes, budget, least
    )
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
    "odd": [3, 17, 63, 100, 1],
    "ones": [1] * 5,
    "blocks": [260, 3, 800, 256],  # more than a block has threads, of a group and of all
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
    # every digit of a float32 decides somewhere
    "bits": lambda n: torch.randint(-(2**31), 2**31, (n,)).int().view(torch.float32).nan_to_num(),
}
CASES = [(sizes, "ties") for sizes in SIZES] + [("odd", v) for v in VALUES if v != "ties"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("min_active", [1, 5])
@pytest.mark.parametrize(("sizes", "values"), CASES, ids=["-".join(case) for case in CASES])
def test_selection_equals_the_ranking(
    sizes: str, values: str, min_active: int, dtype: torch.dtype, launches: list[str]
) -> None:
    total = sum(SIZES[sizes])
    floor = sum(min(min_active, size) for size in SIZES[sizes])
    scores = VALUES[values](total).to(dtype)
    check(scores, SIZES[sizes], floor + (total - floor) // 2, min_active)
    assert launches == ["select_channels"]


def test_selection_equals_the_ranking_at_random() -> None:
    rng = random.Random(0)
    for turn in range(30):
        sizes = [rng.choice([1, 2, 7, 20]) for _ in range(rng.randint(1, 5))]
        min_active = rng.randint(1, 8)
        floor = sum(min(min_active, size) for size in sizes)
        scores = torch.randint(0, rng.choice([2, 9, 99]), (sum(sizes),))
        dtype = [torch.float32, torch.float64][turn % 2]
        check(scores.to(dtype), sizes, rng.randint(floor, sum(sizes)), min_active)


def test_every_budget_of_a_small_network() -> None:
    scores = torch.tensor([2.0, 1, 1, 3, 0, 1, 1, 1, 2])
    for budget in range(2, 10):
        check(scores, [5, 4], budget, 1)


@pytest.mark.parametrize("share", ["least", "all"])
@pytest.mark.parametrize("min_active", [1, 99])
def test_both_ends_of_the_budget(share: str, min_active: int) -> None:
    sizes = [5, 1, 30]
    floor = sum(min(min_active, size) for size in sizes)
    check(torch.randn(36), sizes, floor if share == "least" else 36, min_active)


def test_the_worst_group_is_forced_in() -> None:
    scores = torch.cat([torch.full((20,), INF), torch.full((9,), -INF), torch.zeros(9)])
    check(scores, [20, 9, 9], 12, 2)
    check(scores, [20, 9, 9], 15, 5)


def test_no_more_than_the_least_is_forced() -> None:
    check(torch.zeros(1100), [300, 800], 10, 5)  # ties in several turns of a block
    check(torch.zeros(3100), [3100], 2500, 1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_nan_counts_as_minus_infinity(dtype: torch.dtype) -> None:
    scores = torch.tensor([NAN, -INF, NAN, 1, -NAN, INF, NAN, NAN, -1, -INF], dtype=dtype)
    scores[4] = -scores[0].abs()  # its sign set
    for budget in range(3, 11):
        arguments = [4, 3, 3], budget, 1
        wanted = reference.select_channels(scores, *arguments)
        for got, truth in zip(selection.select_channels(scores, *arguments), wanted, strict=True):
            assert_exact(got, truth)


def test_scores_may_be_strided_and_need_a_gradient() -> None:
    scores = torch.stack([torch.randn(20), torch.full((20,), INF)], 1)[:, 0].requires_grad_()
    wanted = reference.select_channels(scores, [9, 11], 7, 1)
    for got, truth in zip(selection.select_channels(scores, [9, 11], 7, 1), wanted, strict=True):
        assert_exact(got, truth)
        assert not got.requires_grad


def test_reruns_are_equal() -> None:
    scores = torch.randint(0, 5, (100,)).float()
    assert_reruns_equal(lambda: selection.select_channels(scores, [60, 3, 37], 41, 2))


def test_what_is_not_on_a_gpu_is_the_references(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    scores = torch.randn(20)
    wanted = reference.select_channels(scores, [9, 11], 7, 1)
    for got, truth in zip(selection.select_channels(scores, [9, 11], 7, 1), wanted, strict=True):
        assert_exact(got, truth)
    assert launches == []


@pytest.mark.parametrize("count", [0, 1, 32, 33, 100, 512, 513, 1024, 1025, 2**31])
def test_a_block_has_whole_warps_and_no_idle_ones(built: ModuleType, count: int) -> None:
    threads = built.select_threads(count)
    assert threads in (32, 64, 128, 256, 512, 1024)
    assert threads >= count or threads == 1024
    assert threads == 32 or threads / 2 < count

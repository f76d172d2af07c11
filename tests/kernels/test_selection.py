"""The reference of the global top-k against the selectors' ranking, and by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcx_kernels.kernels.reference.selection import group_places, select_channels
from dcx_kernels.selectors import global_top
from tolerances import assert_exact, assert_reruns_equal

INF, NAN = float("inf"), float("nan")


def by_ranking(
    scores: Tensor, sizes: Sequence[int], budget: int, min_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Write what the selectors choose at fixed capacity, group by group."""
    parts = {str(i): part for i, part in enumerate(scores.split(list(sizes)))}
    sets = [s.indices for s in global_top(parts, budget, min_active).values()]
    indices, inverse = [], []
    for size, chosen in zip(sizes, sets, strict=True):
        indices += chosen.tolist() + [-1] * (size - len(chosen))
        places = {channel: place for place, channel in enumerate(chosen.tolist())}
        inverse += [places.get(channel, -1) for channel in range(size)]
    return torch.tensor(indices), torch.tensor(inverse), torch.tensor([len(s) for s in sets])


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, list[int], int, int]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    # few distinct values: ties everywhere, and zeros of both signs
    values = st.sampled_from([-INF, -1.5, -0.0, 0.0, 1e-40, 2.0, INF])
    scores = draw(st.lists(values, min_size=sum(sizes), max_size=sum(sizes)))
    min_active = draw(st.integers(1, 4))
    budget = draw(st.integers(sum(min(n, min_active) for n in sizes), sum(sizes)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(scores, dtype=dtype), sizes, budget, min_active


@settings(deadline=None)  # a busy machine is no defect
@given(selections())
def test_select_channels_equals_the_ranking(selection: tuple[Tensor, list[int], int, int]) -> None:
    for got, wanted in zip(select_channels(*selection), by_ranking(*selection), strict=True):
        assert_exact(got, wanted)


@pytest.mark.parametrize(
    ("scores", "sizes", "budget", "min_active", "indices", "inverse", "counts"),
    [
        ([5, 1, 4, 2, 3], [2, 3], 3, 1, [0, -1, 0, 2, -1], [0, -1, 0, -1, 1], [1, 2]),
        ([9, 8, 7, 1, 2], [3, 2], 3, 1, [0, 1, -1, 1, -1], [0, 1, -1, -1, 0], [2, 1]),
        ([9, 8, 7, 1, 2], [3, 2], 4, 2, [0, 1, -1, 0, 1], [0, 1, -1, 0, 1], [2, 2]),
        ([3, 3, 3, 3, 3], [3, 2], 3, 1, [0, 1, -1, 0, -1], [0, 1, -1, 0, -1], [2, 1]),
        ([0, INF, INF, INF], [1, 3], 2, 1, [0, 0, -1, -1], [0, 0, -1, -1], [1, 1]),
        ([NAN, -INF, NAN, 0], [4], 2, 1, [0, 3, -1, -1], [0, -1, -1, 1], [2]),
        ([-0.0, 0.0, -1.0], [3], 1, 1, [0, -1, -1], [0, -1, -1], [1]),
        ([7, 8, 9], [1, 2], 3, 5, [0, 0, 1], [0, 0, 1], [1, 2]),
        ([7], [1], 1, 1, [0], [0], [1]),
    ],
    ids=[
        "plain", "forced-displaces", "floor-2", "ties", "infinities", "nan-is-minus-inf",
        "signed-zeros", "all", "one-channel",
    ],
)  # fmt: skip
def test_select_channels_by_hand(
    scores: list[float],
    sizes: list[int],
    budget: int,
    min_active: int,
    indices: list[int],
    inverse: list[int],
    counts: list[int],
) -> None:
    got = select_channels(torch.tensor(scores, dtype=torch.float32), sizes, budget, min_active)
    for tensor, wanted in zip(got, (indices, inverse, counts), strict=True):
        assert_exact(tensor, torch.tensor(wanted))


def test_select_channels_reads_nothing_on_the_host() -> None:
    sizes = (3, 1, 5)
    group_places(sizes, torch.device("cpu"))  # made once, from sizes that the host knows
    with FakeTensorMode(allow_non_fake_inputs=True):  # refuses .item(), nonzero, boolean masks
        found = select_channels(torch.empty(9), sizes, 5, 2)
    assert [tuple(t.shape) for t in found] == [(9,), (9,), (3,)]


def test_group_places_are_made_once() -> None:
    first = group_places((2, 3), torch.device("cpu"))
    assert group_places((2, 3), torch.device("cpu")) is first
    assert_exact(first.bounds, torch.tensor([0, 2, 5]))
    assert_exact(first.group_of, torch.tensor([0, 0, 1, 1, 1]))
    assert_exact(first.rank, torch.tensor([0, 1, 0, 1, 2]))


def test_select_channels_reruns_are_equal_and_spare_the_scores() -> None:
    scores = torch.randint(0, 5, (100,)).float()
    scores[7] = NAN
    before = scores.clone()
    assert_reruns_equal(lambda: select_channels(scores, [60, 3, 37], 41, 2))
    assert_exact(scores, before)

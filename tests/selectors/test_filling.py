"""Filling a budget with rows of different weight, against all possibilities."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcx_kernels.selectors.filling import best_rows, largest_sum

WEIGHTS = st.sampled_from([[1, 1, 1], [4, 4, 4], [1, 4, 2], [2, 3, 3], [3, 5, 7], [1, 32, 8]])


@settings(deadline=None)  # a busy machine is no defect
@given(WEIGHTS, st.lists(st.integers(0, 7), min_size=3, max_size=3), st.integers(0, 80))
def test_largest_sum_equals_brute_force(weights, counts, limit):
    sums = [
        sum(n * weight for n, weight in zip(copies, weights, strict=True))
        for copies in product(*(range(count + 1) for count in counts))
    ]
    assert largest_sum(weights, counts, limit) == max(s for s in sums if s <= limit)


@settings(deadline=None)  # a busy machine is no defect
@given(WEIGHTS, st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 40))
def test_best_rows_equals_brute_force(weights, groups, limit):
    # all subsets of the ranking: the heaviest that fits; of those, the one with the better first
    fitting = [
        (sum(weights[g] for g, taken in zip(groups, subset, strict=True) if taken), subset)
        for subset in product((False, True), repeat=len(groups))
    ]
    _, best = max(entry for entry in fitting if entry[0] <= limit)
    expected = [
        sum(t for g, t in zip(groups, best, strict=True) if g == group) for group in (0, 1, 2)
    ]
    assert best_rows(torch.tensor(groups), weights, limit) == expected


def test_best_rows_by_hand():
    ranking = torch.tensor([0, 1, 0, 1])
    # 3 + 2 fill 5 and come first; 7 needs both rows of weight 2, the second before the last 3
    assert best_rows(ranking, [3, 2], 5) == [1, 1]
    assert best_rows(ranking, [3, 2], 7) == [1, 2]
    # 4 is 2 + 2 only: the best row cannot be taken
    assert best_rows(ranking, [3, 2], 4) == [0, 2]
    # 9 has no rows: 8 is nearest
    assert best_rows(ranking, [3, 2], 9) == [2, 1]

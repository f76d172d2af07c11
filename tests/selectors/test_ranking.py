"""The global ranking against a brute-force statement of its rules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcx_kernels.errors import NonFiniteError
from dcx_kernels.selectors import channel_budget, global_top
from dcx_kernels.selectors.rounding import round_widths


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def scores_of(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def brute_force(scores, budget, min_active):
    """The rules word by word: everybody in one list, forced channels first, then the best."""
    ranking = sorted(
        (-float(value), g, index)
        for g, values in enumerate(scores.values())
        for index, value in enumerate(values)
    )
    forced = []
    for g in range(len(scores)):
        forced += [entry for entry in ranking if entry[1] == g][:min_active]
    others = [entry for entry in ranking if entry not in forced]
    chosen = forced + others[: budget - len(forced)]
    return {
        name: sorted(index for _, group, index in chosen if group == g)
        for g, name in enumerate(scores)
    }


@st.composite
def selections(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    # few distinct values: ties everywhere
    values = [draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)) for n in sizes]
    min_active = draw(st.integers(1, 4))
    least = sum(min(n, min_active) for n in sizes)
    budget = draw(st.integers(least, sum(sizes)))
    return scores_of(**{f"g{i}": v for i, v in enumerate(values)}), budget, min_active


@settings(deadline=None)  # a busy machine is no defect
@given(selections())
def test_global_top_equals_brute_force(selection):
    scores, budget, min_active = selection
    assert as_lists(global_top(scores, budget, min_active)) == brute_force(*selection)


def test_global_top_ties_go_to_lower_group_then_lower_index():
    scores = scores_of(b=[1.0, 1.0, 1.0], a=[1.0, 1.0, 1.0])
    assert as_lists(global_top(scores, 3)) == {"b": [0, 1], "a": [0]}
    assert as_lists(global_top(scores, 4)) == {"b": [0, 1, 2], "a": [0]}


def test_global_top_forced_channel_displaces_the_lowest_ranked():
    scores = scores_of(a=[9.0, 8.0, 7.0], b=[0.1, 0.2, 0.3])
    assert as_lists(global_top(scores, 3)) == {"a": [0, 1], "b": [2]}
    assert as_lists(global_top(scores, 4, min_active=2)) == {"a": [0, 1], "b": [1, 2]}


def test_global_top_infinite_scores_come_first():
    scores = scores_of(a=[math.inf, 5.0], b=[1.0, math.inf])
    assert as_lists(global_top(scores, 2)) == {"a": [0], "b": [1]}


def test_global_top_refuses_nan_by_name():
    with pytest.raises(NonFiniteError, match="b: expected scores that are numbers, got NaN"):
        global_top(scores_of(a=[1.0], b=[1.0, math.nan]), 2)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (1, {}, r"a budget of 2 \(min_active=1 in 2 groups\) to 5 channels, got 1"),
        (6, {}, "to 5 channels, got 6"),
        (3, {"min_active": 2}, "a budget of 4"),
        (3, {"min_active": 0}, "min_active to be an int of at least 1, got 0"),
        (3, {"round_to": 0}, "round_to to be an int of at least 1, got 0"),
    ],
)
def test_global_top_names_what_is_out_of_range(budget, options, message):
    with pytest.raises(ValueError, match=message):
        global_top(scores_of(a=[1.0, 2.0], b=[1.0, 2.0, 3.0]), budget, **options)


def test_global_top_names_the_group_of_a_wrong_score():
    with pytest.raises(ValueError, match=r"b: expected 1-D floating scores, got torch.int64"):
        global_top({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}, 2)


@settings(deadline=None)  # a busy machine is no defect
@given(selections(), st.integers(2, 4))
def test_global_top_round_to_keeps_budget_and_the_best(selection, round_to):
    scores, budget, min_active = selection
    sets = global_top(scores, budget, min_active, round_to)
    assert sum(map(len, sets.values())) == budget
    for name, chosen in sets.items():
        values = scores[name]
        assert len(chosen) >= min(min_active, len(values))
        best = sorted(range(len(values)), key=lambda i, v=values: (-float(v[i]), i))
        assert chosen.indices.tolist() == sorted(best[: len(chosen)])


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.integers(2, 8).flatmap(
        lambda q: st.tuples(
            st.just(q),
            st.lists(
                st.integers(1, 6).flatmap(
                    lambda n: st.tuples(st.just(n * q), st.integers(1, n * q))
                ),
                min_size=1,
                max_size=6,
            ),
        )
    )
)
def test_round_widths_at_most_one_group_is_off_the_grid(case):
    round_to, groups = case
    sizes = [size for size, _ in groups]
    widths = [width for _, width in groups]
    new = round_widths(widths, sizes, [1] * len(sizes), round_to)
    assert sum(new) == sum(widths)
    assert all(1 <= w <= size for w, size in zip(new, sizes, strict=True))
    off_grid = sum(w % round_to != 0 for w in new)
    if sum(widths) >= round_to * len(sizes):  # every group can have a multiple
        assert off_grid == (1 if sum(widths) % round_to else 0)


def test_round_widths_by_hand():
    # 11 + 5 = 16: both are one off a multiple at best, 12 + 4 moves least
    assert round_widths([11, 5], [16, 16], [1, 1], 4) == [12, 4]
    # 18 = 4 * 4 + 2: from [12, 8] one gives 2 back, the one that ends nearest; ties lower group
    assert round_widths([11, 7], [16, 16], [1, 1], 4) == [10, 8]
    assert round_widths([11, 6], [16, 16], [1, 1], 4) == [12, 5]
    # a group of 3 has no multiple of 4 and keeps its width
    assert round_widths([2, 6, 8], [3, 16, 16], [1, 1, 1], 4) == [2, 6, 8]
    assert round_widths([2, 7, 9], [3, 16, 16], [1, 1, 1], 4) == [2, 8, 8]
    # everything active: sizes that are no multiples are complete
    assert round_widths([10, 7], [10, 7], [1, 1], 4) == [10, 7]
    assert round_widths([1, 8, 9], [3, 16, 16], [1, 1, 1], 4) == [2, 8, 8]  # and the remainder
    # [12, 12, 12] is 4 too many: the group that a step of 4 harms least gives them
    assert round_widths([10, 11, 11], [16, 16, 16], [1, 1, 1], 4) == [8, 12, 12]
    # too few channels for four in each group: the smallest group is let off
    assert round_widths([1, 2], [8, 8], [1, 1], 4) == [1, 2]
    assert round_widths([3, 1, 6], [16, 16, 16], [1, 1, 1], 4) == [4, 1, 5]
    # more channels than the multiples 8, 4 and 16 hold
    assert round_widths([10, 7, 15], [10, 7, 16], [1, 1, 1], 4) == [9, 7, 16]


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_round_widths_always_keeps_sum_and_limits(groups, min_active, round_to):
    sizes = [size for size, _ in groups]
    floors = [min(size, min_active) for size in sizes]
    widths = [
        floor + round(share * (size - floor))
        for (size, share), floor in zip(groups, floors, strict=True)
    ]
    new = round_widths(widths, sizes, floors, round_to)
    assert sum(new) == sum(widths)
    for width, floor, size in zip(new, floors, sizes, strict=True):
        assert floor <= width <= size


def test_channel_budget_is_the_papers():
    assert channel_budget(5504, 0.2) == 1100
    assert channel_budget(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert channel_budget(7, 1.0) == 7


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_channel_budget_refuses_impossible_density(density):
    with pytest.raises(ValueError, match=r"density in \(0, 1\]"):
        channel_budget(10, density)

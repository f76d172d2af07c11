"""Groups whose channels form runs: equal counts in every run, ranking, budget, rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.selectors import CUCB, DCP, Random, Static, global_top
from dcx_kernels.selectors.rounding import round_widths

INF = math.inf


@dataclass(frozen=True)
class Group:
    num_channels: int
    runs: int = 1
    selectable: bool = True


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def scores_of(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def least_of(size, runs, min_active):
    """The least channels of a group, in whole rows."""
    return -(-min(size, min_active) // runs) * runs


def assert_even(sets, runs, min_active=1):
    """As many channels in each run, at least one, and ``min_active`` in all."""
    for name, chosen in sets.items():
        counts = chosen.counts_per_group(runs[name])
        assert 0 < min(counts) == max(counts), name
        assert len(chosen) >= min(min_active, chosen.num_channels), name


def brute_force(scores, runs, budget, min_active):
    """The rules word by word; all possible numbers of rows are looked at."""
    rows, ranking = {}, []
    for g, (name, values) in enumerate(scores.items()):
        length = len(values) // runs[name]
        ordered = [
            sorted(range(k * length, (k + 1) * length), key=lambda i, v=values: (-float(v[i]), i))
            for k in range(runs[name])
        ]
        rows[name] = list(zip(*ordered, strict=True))
        for j, row in enumerate(rows[name]):
            ranking.append((-sum(float(values[i]) for i in row) / len(row), g, j, name))
    ranking.sort()
    floors = {n: least_of(len(v), runs[n], min_active) // runs[n] for n, v in scores.items()}
    totals = []
    for counts in product(*(range(floors[n], len(rows[n]) + 1) for n in scores)):
        count = dict(zip(scores, counts, strict=True))
        total = sum(count[name] * runs[name] for name in scores)
        # heaviest within the budget, then the first row of the ranking that makes a difference
        taken = [j < count[name] for _, _, j, name in ranking]
        totals.append((total, taken, count))
    possible = [entry for entry in totals if entry[0] <= budget] or [min(totals)]
    _, _, best = max(possible, key=lambda entry: entry[:2])
    return {n: sorted(i for row in rows[n][: best[n]] for i in row) for n in scores}


@st.composite
def selections(draw):
    shapes = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 1, 2, 3, 4]), st.integers(1, 4)), min_size=1, max_size=4
        )
    )
    # few distinct values: ties everywhere
    scores = {
        f"g{i}": torch.tensor(draw(st.lists(st.integers(0, 4), min_size=r * n, max_size=r * n)))
        for i, (r, n) in enumerate(shapes)
    }
    runs = {f"g{i}": r for i, (r, _) in enumerate(shapes)}
    min_active = draw(st.integers(1, 4))
    least = sum(min(len(v), min_active) for v in scores.values())
    budget = draw(st.integers(least, sum(map(len, scores.values()))))
    return {name: v.double() for name, v in scores.items()}, runs, budget, min_active


@settings(deadline=None, max_examples=300)  # a busy machine is no defect
@given(selections())
def test_global_top_with_runs_equals_brute_force(selection):
    scores, runs, budget, min_active = selection
    sets = global_top(scores, budget, min_active, runs=runs)
    assert as_lists(sets) == brute_force(*selection)
    assert_even(sets, runs, min_active)


@settings(deadline=None)  # a busy machine is no defect
@given(selections(), st.integers(2, 6))
def test_global_top_round_to_keeps_the_total_and_the_best_rows(selection, round_to):
    scores, runs, budget, min_active = selection
    sets = global_top(scores, budget, min_active, round_to, runs)
    total = sum(map(len, global_top(scores, budget, min_active, runs=runs).values()))
    assert sum(map(len, sets.values())) == total
    assert_even(sets, runs, min_active)
    for name, chosen in sets.items():
        for k, values in enumerate(scores[name].view(runs[name], -1)):
            kept = [i - k * len(values) for i in chosen.indices.tolist() if i // len(values) == k]
            best = sorted(range(len(values)), key=lambda i, v=values: (-float(v[i]), i))
            assert kept == sorted(best[: len(kept)])


def test_rows_by_hand():
    # runs (3 9 5) and (8 1 2): rows 9 8, 5 2, 3 1 with the means 8.5, 3.5, 2
    scores = scores_of(a=[3.0, 9.0, 5.0, 8.0, 1.0, 2.0], b=[3.0, 4.0, 6.0])
    runs = {"a": 2}
    assert as_lists(global_top(scores, 4, runs=runs)) == {"a": [1, 3], "b": [1, 2]}
    # one place is left beside 8.5, 6 and 4; 3.5 does not fit: 3 does
    assert as_lists(global_top(scores, 5, runs=runs)) == {"a": [1, 3], "b": [0, 1, 2]}
    assert as_lists(global_top(scores, 6, runs=runs)) == {"a": [1, 2, 3, 5], "b": [1, 2]}
    # min_active counts channels: three are two rows, which makes seven
    assert as_lists(global_top(scores, 6, 3, runs=runs)) == {"a": [1, 2, 3, 5], "b": [0, 1, 2]}


def test_rows_ties_go_to_lower_group_then_lower_index():
    scores = scores_of(b=[1.0] * 6, a=[1.0] * 6)
    sets = global_top(scores, 8, runs={"a": 2, "b": 3})
    assert as_lists(sets) == {"b": [0, 1, 2, 3, 4, 5], "a": [0, 3]}


def test_rows_with_infinite_scores():
    # rows inf 5, inf -inf, 1 -inf
    scores = scores_of(a=[INF, 1.0, INF, -INF, 5.0, -INF], b=[5.0, 6.0, 7.0, -9.0])
    assert as_lists(global_top(scores, 5, runs={"a": 2})) == {"a": [0, 2, 3, 4], "b": [2]}
    assert as_lists(global_top(scores, 8, runs={"a": 2})) == {"a": [0, 2, 3, 4], "b": [0, 1, 2, 3]}


def test_row_means_never_rise_whatever_rounding_does():
    # the same 37 numbers in every row, in another order: equal means, or sums rounded differently
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(37, 1, generator=generator, dtype=torch.float64).expand(37, 40)
    values = values - torch.arange(40) * 1e-17
    sets = global_top({"a": values.flatten()}, 37 * 13, runs={"a": 37})
    assert sets["a"].indices.tolist() == [k * 40 + j for k in range(37) for j in range(13)]


@pytest.mark.parametrize(
    ("groups", "density", "budget"),
    [
        ({"a": Group(64, 32)}, 0.7, 32),  # 44.8: one row
        ({"a": Group(64, 32)}, 0.1, 32),  # one channel a run is more than 6.4
        ({"a": Group(64, 32), "b": Group(10)}, 0.5, 37),
        ({"a": Group(64, 32), "b": Group(10)}, 0.99, 73),
        ({"a": Group(64, 32), "b": Group(4)}, 0.9, 36),  # 61: b is full
        ({"a": Group(12, 3), "b": Group(12, 4)}, 0.75, 18),
        ({"a": Group(12, 3), "b": Group(12, 4)}, 0.5, 11),  # 12 is no 3 a + 4 b with both
    ],
)
@pytest.mark.parametrize("selector", [CUCB, DCP, Random])
def test_budget_is_the_nearest_total(selector, groups, density, budget):
    chosen = selector(groups, density)
    assert chosen.budget == budget == sum(map(len, chosen.final().values()))


def test_round_widths_with_runs_by_hand():
    # b moves by lcm(8, 3) = 24
    assert round_widths([17, 21], [32, 48], [1, 3], 8, [1, 3]) == [14, 24]
    assert round_widths([23, 33], [32, 48], [1, 3], 8, [1, 3]) == [32, 24]
    # lcm(4, 6) = 12 is more than b has: it keeps its width
    assert round_widths([10, 6], [16, 6], [1, 6], 4, [1, 6]) == [10, 6]
    # 8, 24 and 16 are one too many, which none can give: b goes back to 21, a takes the two left
    widths, sizes, runs = [10, 21, 16], [20, 48, 32], [2, 3, 2]
    assert round_widths(widths, sizes, runs, 8, runs) == [10, 21, 16]


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 3, 8]), st.integers(1, 20), st.floats(0, 1)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 9),
)
def test_round_widths_with_runs_keeps_sum_limits_and_runs(groups, round_to):
    runs = [r for r, _, _ in groups]
    sizes = [r * n for r, n, _ in groups]
    widths = [r * (1 + round(share * (n - 1))) for r, n, share in groups]
    new = round_widths(widths, sizes, runs, round_to, runs)
    assert sum(new) == sum(widths)
    for width, size, r in zip(new, sizes, runs, strict=True):
        assert r <= width <= size and width % r == 0


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([2, 4, 6, 8]),
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_round_widths_with_equal_runs_leaves_at_most_one_group_off(runs, round_to, groups):
    grid = math.lcm(runs, round_to)
    sizes = [grid * n for n, _ in groups]
    widths = [
        runs * max(1, round(share * size / runs))
        for (_, share), size in zip(groups, sizes, strict=True)
    ]
    new = round_widths(widths, sizes, [runs] * len(sizes), round_to, [runs] * len(sizes))
    if sum(widths) >= grid * len(sizes):  # every group can have a multiple
        assert sum(width % grid != 0 for width in new) == (1 if sum(widths) % grid else 0)


@pytest.mark.parametrize("runs", [3, 0, -2, True, 2.0])
def test_runs_that_do_not_divide_are_refused_by_name(runs):
    groups = {"a": Group(4), "b": Group(8, runs)}
    for selector in (CUCB, DCP, Random):
        with pytest.raises(ValueError, match=f"b: expected .* divides the 8 channels, got {runs}"):
            selector(groups, 0.5)
    with pytest.raises(ValueError, match="b: expected"):
        global_top({"a": torch.ones(4), "b": torch.ones(8)}, 6, runs={"b": runs})
    with pytest.raises(ValueError, match="b: expected"):
        Static({"a": ChannelSet([0], 4), "b": ChannelSet([0, 4], 8)}, groups)


def test_global_top_refuses_runs_of_unknown_groups():
    with pytest.raises(ValueError, match=r"runs of \['a'\], got 'b'"):
        global_top({"a": torch.ones(4)}, 2, runs={"b": 2})

"""CUCB, DCP, Random and Static on groups whose channels form runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.selectors import CUCB, DCP, Random, Static


@dataclass(frozen=True)
class Group:
    num_channels: int
    runs: int = 1
    selectable: bool = True


RESNEXT = {f"layer{i}": Group(n, 32) for i, n in enumerate([128] * 6 + [256] * 8 + [512] * 12)}
MIXED = {
    "stem": Group(64),
    **{f"layer{i}": Group(n, 32) for i, n in enumerate([128, 128, 256, 256])},
    "shuffle": Group(48, 3),
    "last": Group(10, selectable=False),
}


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def assert_even(sets, groups, min_active=1):
    """As many channels in each run, at least one, and ``min_active`` in all."""
    for name, chosen in sets.items():
        counts = chosen.counts_per_group(groups[name].runs)
        assert 0 < min(counts) == max(counts), name
        assert len(chosen) >= min(min_active, chosen.num_channels), name


def run(selector, steps, seed=0):
    """Take ``steps`` steps with seeded random saliency; return what was selected."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        sets = selector.select()
        history.append(as_lists(sets))
        selector.update({n: torch.rand(len(s), generator=generator) for n, s in sets.items()})
    return history


def same_state(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def cover(selector, groups, min_active=1):
    """Initialise to the end; return the number of steps."""
    while selector.initialising:
        assert selector.num_steps < 1000
        sets = selector.select()
        assert_even(sets, groups, min_active)
        assert sum(map(len, sets.values())) <= selector.budget
        selector.update({name: torch.ones(len(s)) for name, s in sets.items()})
    assert all(int(pulls.min()) >= 1 for pulls in selector.num_pulls.values())
    return selector.num_steps


@st.composite
def networks(draw, choices):
    shapes = draw(
        st.lists(st.tuples(st.sampled_from(choices), st.integers(1, 6)), min_size=1, max_size=5)
    )
    groups = {f"g{i}": Group(r * n, r) for i, (r, n) in enumerate(shapes)}
    min_active = draw(st.integers(1, 4))
    least = sum(min(g.num_channels, min_active) for g in groups.values())
    share = least / sum(g.num_channels for g in groups.values())
    return groups, max(share, draw(st.floats(0.05, 1))), min_active


@settings(deadline=None)  # a busy machine is no defect
@given(st.sampled_from([1, 2, 3, 8]).flatmap(lambda r: networks([r])), st.integers(0, 5))
def test_covering_takes_the_planned_steps_with_equal_runs(network, seed):
    groups, density, min_active = network
    selector = CUCB(groups, density, min_active=min_active, seed=seed)
    assert cover(selector, groups, min_active) == selector.covering_steps


@settings(deadline=None)  # a busy machine is no defect
@given(networks([1, 1, 2, 3, 8]), st.sampled_from([1, 1, 4]), st.integers(0, 5))
def test_covering_shows_every_channel_with_different_runs(network, round_to, seed):
    groups, density, min_active = network
    options = {"min_active": min_active, "round_to": round_to, "seed": seed}
    selector = CUCB(groups, density, **options)
    steps = cover(selector, groups, min_active)
    # a row of each group at least is new in each step
    assert steps <= max(g.num_channels // g.runs for g in groups.values())
    history = run(selector, 3)
    assert all(sum(map(len, sets.values())) == selector.budget for sets in history)
    again = CUCB(groups, density, **options)
    cover(again, groups, min_active)
    assert run(again, 3) == history


@pytest.mark.parametrize("density", [0.25, 0.4, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("groups", [RESNEXT, MIXED], ids=["resnext", "mixed"])
def test_covering_takes_one_over_density_steps(groups, density):
    assert cover(CUCB(groups, density), groups) == math.ceil(1 / density)


def test_covering_leaves_places_empty_rather_than_show_seen_channels():
    # exactly 130 are four rows and two of b, always: b would take twelve steps
    groups = {"a": Group(96, 32), "b": Group(24), "c": Group(32, 32)}
    selector = CUCB(groups, 130 / 152)
    assert selector.budget == 130
    assert cover(selector, groups) == selector.covering_steps == 2


def test_covering_steps_know_how_many_rows_fit_beside_the_others():
    # 96 of 144 are for one row each, and no second row of 32 fits into the 24 left
    groups = {"a": Group(192, 32), "b": Group(576, 32), "c": Group(256, 32), "d": Group(24)}
    selector = CUCB(groups, 121 / 1048)
    assert selector.budget == 120
    assert cover(selector, groups) == selector.covering_steps == 18


def test_covering_steps_count_the_rows_that_min_active_repeats():
    # twelve rows in sets of five; but three sets hold a and d three times: 16 rows, not 15
    groups = {"a": Group(4, 4), "b": Group(20, 4), "c": Group(20, 4), "d": Group(4, 4)}
    selector = CUCB(groups, 20 / 48)
    assert cover(selector, groups) == selector.covering_steps == 4


@pytest.mark.parametrize("seed", range(40))
def test_covering_holds_back_rows_that_min_active_needs_later(seed):
    # each of the three sets needs a row of b, so none may take two of its three
    groups = {"a": Group(24, 2), "b": Group(6, 2)}
    selector = CUCB(groups, 1 / 3, seed=seed)
    assert cover(selector, groups) == 3
    assert selector.num_pulls["b"].tolist() == [1] * 6


def test_covering_is_random_in_every_run():
    firsts = torch.zeros(32)
    for seed in range(400):
        firsts += CUCB({"a": Group(32, 4)}, 0.5, seed=seed).select()["a"].mask()
    # 200 +- 10 each; six deviations
    assert int((firsts - 200).abs().max()) < 60


def test_cucb_ranks_rows_by_their_mean_bound():
    selector = CUCB({"a": Group(4, 2), "b": Group(2)}, density=0.5)
    assert selector.budget == 3
    state = selector.state_dict()
    state["mean"] = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.5, 0.4], dtype=torch.float64)
    state["num_pulls"] = torch.tensor([1, 1, 1, 1, 1, 1])
    state["num_steps"], state["time"] = 2, 6
    selector.load_state_dict(state)
    # one bonus for all: rows 0.9 0.8 and 0.1 0.2
    assert as_lists(selector.select()) == {"a": [0, 3], "b": [0]}
    selector.update({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([2.0])})
    assert selector.mean["a"].tolist() == pytest.approx([0.75, 0.1, 0.2, 0.8])
    assert selector.mean["b"].tolist() == pytest.approx([0.75, 0.4])
    # t = 8: bonus 1.766 where T = 1, 1.249 where T = 2. a: 1.999 1.866 | 1.966 2.049, b: 1.999
    # 2.166; rows of a 2.024 and 1.916
    assert as_lists(selector.select()) == {"a": [0, 3], "b": [1]}
    assert as_lists(selector.final()) == {"a": [0, 3], "b": [0]}


@pytest.mark.parametrize("tau", [None, 2])
@pytest.mark.parametrize("round_to", [1, 8])
def test_cucb_sets_are_even_in_every_phase(tau, round_to):
    selector = CUCB(MIXED, 0.3, tau=tau, round_to=round_to)
    for _ in range(10):
        sets = selector.select()
        assert_even(sets, MIXED)
        for name, chosen in sets.items():
            assert chosen == ChannelSet(chosen.indices, MIXED[name].num_channels)
        if tau:
            assert sum(map(len, sets.values())) == selector.budget
        selector.update({name: torch.rand(len(s)) for name, s in sets.items()})
    assert_even(selector.final(), MIXED)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.parametrize("pending", [False, True])
def test_cucb_state_round_trip_with_runs(steps, pending):
    groups = {"a": Group(96, 32), "b": Group(24), "c": Group(32, 32)}  # first set under the budget
    whole, resumed = (CUCB(groups, 130 / 152, seed=5) for _ in range(2))
    run(whole, steps, seed=1)
    if pending:
        whole.select()
    resumed.load_state_dict(whole.state_dict())
    assert same_state(whole.state_dict(), resumed.state_dict())
    assert run(whole, 4, seed=2) == run(resumed, 4, seed=2)
    assert same_state(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("pending", [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
def test_cucb_load_refuses_a_pending_set_that_is_uneven_or_too_large(pending):
    selector = CUCB({"a": Group(4, 2)}, 0.5)
    state = {**selector.state_dict(), "pending": torch.tensor(pending, dtype=torch.bool)}
    with pytest.raises(ValueError, match="possible 'pending'"):
        selector.load_state_dict(state)


@pytest.mark.parametrize("selector", [CUCB, DCP, Random])
def test_round_to_gives_multiples_of_both(selector):
    groups = {"a": Group(48), "b": Group(96, 3), "c": Group(64, 16)}
    chosen = selector(groups, 0.5, round_to=8)
    assert chosen.budget == 104
    for _ in range(6):
        sets = chosen.select()
        assert [len(s) % grid for s, grid in zip(sets.values(), (8, 24, 16), strict=True)] == [
            0
        ] * 3
        chosen.update({name: torch.rand(len(s)) for name, s in sets.items()})


def test_dcp_ranks_rows_by_their_mean_utility():
    selector = DCP({"a": Group(4, 2), "b": Group(2)}, density=0.5, decay=0.5, warmup_steps=1)
    assert as_lists(selector.select()) == {"a": [0, 1, 2, 3], "b": [0, 1]}
    # theta: a .8 .2 | .4 1, b 1 .5: rows of a .8 1 and .2 .4, that is .9 and .3; b 1 and .5
    selector.update({"a": torch.tensor([4.0, 1.0, 2.0, 5.0]), "b": torch.tensor([2.0, 1.0])})
    assert selector.budget == 3
    assert as_lists(selector.select()) == {"a": [0, 3], "b": [0]}
    # a0 .4 + 0, a3 .5 + 1: rows .4 1.5 and .2 .4 still
    selector.update({"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([3.0])})
    assert selector.utility["a"].tolist() == pytest.approx([0.4, 0.2, 0.4, 1.5])
    assert as_lists(selector.select()) == as_lists(selector.final()) == {"a": [0, 3], "b": [0]}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("round_to", [1, 8])
def test_dcp_sets_are_even_in_every_phase(strict, round_to):
    selector = DCP(MIXED, 0.3, warmup_steps=2, strict=strict, min_active=5, round_to=round_to)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        sets = selector.select()
        assert_even(sets, MIXED, min_active=5)
        total = sum(map(len, sets.values()))
        assert total <= selector.budget or (step < 2 and all(s.is_full for s in sets.values()))
        if step >= 2 and not strict:
            assert total == selector.budget
        for name, chosen in sets.items():
            assert chosen == ChannelSet(chosen.indices, MIXED[name].num_channels)
        selector.update({n: torch.rand(len(s), generator=generator) for n, s in sets.items()})
    assert_even(selector.final(), MIXED, min_active=5)


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("pending", [False, True])
def test_dcp_state_round_trip_with_runs(steps, pending):
    whole, resumed = (DCP(MIXED, 0.3, warmup_steps=1) for _ in range(2))
    run(whole, steps, seed=1)
    if pending:
        whole.select()
    resumed.load_state_dict(whole.state_dict())
    assert same_state(whole.state_dict(), resumed.state_dict())
    assert run(whole, 4, seed=2) == run(resumed, 4, seed=2)
    assert same_state(whole.state_dict(), resumed.state_dict())


def test_random_with_runs():
    selector, same = (Random(MIXED, 0.3, min_active=5, seed=2) for _ in range(2))
    seen = set()
    for _ in range(10):
        sets = selector.select()
        assert_even(sets, MIXED, min_active=5)
        assert sum(map(len, sets.values())) == selector.budget
        assert as_lists(sets) == as_lists(same.select())
        seen.add(str(as_lists(sets)))
    assert len(seen) == 10
    assert_even(selector.final(), MIXED, min_active=5)
    same.load_state_dict(selector.state_dict())
    assert as_lists(selector.select()) == as_lists(same.select())


GROUPS = {"a": Group(6, 2), "b": Group(4), "last": Group(10, selectable=False)}


def test_static_holds_its_sets_against_the_groups():
    sets = {"b": ChannelSet([3], 4), "a": ChannelSet([0, 5], 6)}
    selector = Static(sets, GROUPS)
    assert as_lists(selector.select()) == {"a": [0, 5], "b": [3]}
    assert list(selector.select()) == ["a", "b"]  # the groups' order
    other = Static({"a": ChannelSet([1, 2, 3, 4], 6), "b": ChannelSet([0], 4)}, GROUPS)
    other.load_state_dict(selector.state_dict())
    assert as_lists(other.final()) == {"a": [0, 5], "b": [3]}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a": [0, 1], "b": [0]}, r"a: expected the same number .* each of 2 runs, got \[2, 0\]"),
        ({"a": [0, 1, 3], "b": [0]}, r"a: expected the same number .*, got \[2, 1\]"),
        ({"a": [0, 3]}, "b: expected a set of 4 channels, got none"),
        ({"a": [0, 3], "c": [0], "b": [0]}, r"expected sets of \['a', 'b'\], got 'c'"),
        ({"a": [0, 3], "b": [0], "last": [0]}, r"expected sets of \['a', 'b'\], got 'last'"),
    ],
)
def test_static_refuses_sets_that_do_not_fit_the_groups(sets, message):
    sizes = {"a": 6, "b": 4, "c": 2, "last": 10}
    with pytest.raises(ValueError, match=message):
        Static({name: ChannelSet(ids, sizes[name]) for name, ids in sets.items()}, GROUPS)


def test_static_refuses_a_set_of_another_size():
    sets = {"a": ChannelSet([0, 3], 8), "b": ChannelSet([0], 4)}
    with pytest.raises(ValueError, match="a: expected a set of 6 channels, got one of 8"):
        Static(sets, GROUPS)


def test_static_load_refuses_uneven_sets():
    selector = Static({"a": ChannelSet([0, 5], 6), "b": ChannelSet([3], 4)}, GROUPS)
    state = selector.state_dict()
    state["mask"][1] = True
    with pytest.raises(ValueError, match=r"a: expected the same number .* got \[2, 1\]"):
        selector.load_state_dict(state)
    assert as_lists(selector.select()) == {"a": [0, 5], "b": [3]}

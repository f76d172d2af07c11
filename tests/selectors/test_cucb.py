"""CUCB: a sequence computed by hand, covering and statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.selectors import CUCB

GROUPS = {"a": 3, "b": 2}
VGG19 = {f"features.{i}": n for i, n in enumerate([64] * 2 + [128] * 2 + [256] * 4 + [512] * 8)}


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def tensors(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def saliency_for(sets, generator):
    return {name: torch.rand(len(s), generator=generator) for name, s in sets.items()}


def run(selector, steps, seed=0):
    """Take ``steps`` steps with seeded random saliency; return what was selected."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        sets = selector.select()
        history.append(as_lists(sets))
        selector.update(saliency_for(sets, generator))
    return history


def same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key
    return True


def started(mean):
    """A selector of three of GROUPS' five channels, each active once, covered at time 5."""
    selector = CUCB(GROUPS, density=0.6)
    state = selector.state_dict()
    state["mean"] = torch.tensor(mean, dtype=torch.float64)
    state["num_pulls"] = torch.ones(5, dtype=torch.int64)
    state["num_steps"], state["time"] = 2, 5
    selector.load_state_dict(state)
    return selector


def test_cucb_sequence_by_hand():
    selector = started([0.6, 0.8, 0.1, 0.9, 0.2])

    # t = 6: one bonus for all, sqrt(1.5 ln 6) = 1.639402; the means decide: b0 .9, a1 .8, a0 .6
    assert as_lists(selector.select()) == {"a": [0, 1], "b": [0]}
    # rewards a (3, 4) / 5 = (.6, .8), b 7 / 7 = 1
    selector.update(tensors(a=[3.0, 4.0], b=[7.0]))
    assert selector.mean["a"].tolist() == pytest.approx([0.6, 0.8, 0.1])
    assert selector.mean["b"].tolist() == pytest.approx([0.95, 0.2])
    assert selector.num_pulls["a"].tolist() == [2, 2, 1]
    assert selector.num_pulls["b"].tolist() == [2, 1]

    # t = 7: bonus 1.708469 where T = 1, 1.208070 where T = 2
    # a: 1.808070 2.008070 1.808469   b: 2.158070 1.908469
    assert as_lists(selector.select()) == {"a": [1], "b": [0, 1]}
    selector.update(tensors(a=[2.0], b=[0.0, 5.0]))
    # a1 = (.8 + .8 + 1) / 3, b0 = (.9 + 1 + 0) / 3, b1 = (.2 + 1) / 2
    assert selector.mean["a"].tolist() == pytest.approx([0.6, 2.6 / 3, 0.1])
    assert selector.mean["b"].tolist() == pytest.approx([1.9 / 3, 0.6])

    # t = 8: bonus 1.766115, 1.248832, 1.019667 where T = 1, 2, 3
    # a: 1.848832 1.886334 1.866115   b: 1.653000 1.848832: the top three leave b empty, and
    # min_active forces its best in for a0
    assert as_lists(selector.select()) == {"a": [1, 2], "b": [1]}
    selector.update(tensors(a=[0.0, 0.0], b=[1.0]))  # a group of zeros gives zeros
    assert selector.mean["a"].tolist() == pytest.approx([0.6, 2.6 / 4, 0.1 / 2])
    assert selector.mean["b"].tolist() == pytest.approx([1.9 / 3, 2.2 / 3])
    assert selector.num_pulls["a"].tolist() == [2, 4, 2]

    # without a bonus: b1 .733, a1 .65, b0 .633
    assert as_lists(selector.final()) == {"a": [1], "b": [0, 1]}


def test_cucb_time_starts_at_the_number_of_channels():
    # which of "often and good" and "rare and bad" wins depends on ln t:
    # 0.9 + sqrt(1.5 ln t / 4) against sqrt(1.5 ln t / 1): even at ln t = 2.16, t = 8.67
    for time, expected in ((7, [0]), (8, [1])):  # select looks one step ahead: t = 8, t = 9
        selector = CUCB({"a": 2}, density=0.5)
        state = selector.state_dict()
        state["mean"] = torch.tensor([0.9, 0.0], dtype=torch.float64)
        state["num_pulls"] = torch.tensor([4, 1])
        state["num_steps"], state["time"] = 5, time
        selector.load_state_dict(state)
        assert as_lists(selector.select()) == {"a": expected}


def test_cucb_time_counts_one_a_step_after_covering():
    selector = CUCB({"a": 8}, density=0.5)
    times = []
    for _ in range(4):
        run(selector, 1)
        times.append(selector.state_dict()["time"])
    assert times == [0, 8, 9, 10]


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.floats(0.05, 1),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 4]),
    st.integers(0, 5),
)
def test_cucb_covering_shows_every_channel(sizes, density, min_active, round_to, seed):
    groups = {f"g{i}": n for i, n in enumerate(sizes)}
    least = sum(min(n, min_active) for n in sizes)
    density = max(density, least / sum(sizes))
    selector = CUCB(groups, density, min_active=min_active, round_to=round_to, seed=seed)
    while selector.initialising:
        assert selector.num_steps < 20 * selector.covering_steps
        sets = selector.select()
        assert sum(map(len, sets.values())) == selector.budget
        assert all(len(s) >= min(s.num_channels, min_active) for s in sets.values())
        selector.update({name: torch.ones(len(s)) for name, s in sets.items()})
    pulls = torch.cat(list(selector.num_pulls.values()))
    assert int(pulls.min()) >= 1
    if round_to == 1:
        assert selector.num_steps == selector.covering_steps


@pytest.mark.parametrize("density", [0.2, 0.25, 0.4, 0.5, 1.0])
def test_cucb_covering_is_a_partition_in_ceil_steps(density):
    selector = CUCB(VGG19, density)
    steps = math.ceil(5504 / selector.budget)
    assert selector.covering_steps == steps
    run(selector, steps)
    pulls = torch.cat(list(selector.num_pulls.values()))
    assert not selector.initialising
    # only what fills the last set up comes twice
    assert int((pulls == 2).sum()) == steps * selector.budget - 5504
    assert int(pulls.max()) <= 2


def test_cucb_covering_of_groups_smaller_than_the_number_of_sets():
    # b has one channel and min_active repeats it: 9 channels in sets of 3 need four steps
    selector = CUCB({"a": 8, "b": 1}, density=1 / 3)
    assert selector.covering_steps == 4
    run(selector, 4)
    assert not selector.initialising
    assert selector.num_pulls["b"].tolist() == [4]


@pytest.mark.parametrize("seed", range(40))
def test_cucb_covering_holds_back_what_min_active_needs_later(seed):
    # were both channels of b in the first of the two sets, the second would have to repeat one
    selector = CUCB({"a": 8, "b": 2}, density=0.5, seed=seed)
    run(selector, 2)
    assert not selector.initialising
    assert selector.num_pulls["b"].tolist() == [1, 1]


def test_cucb_covering_sets_are_random():
    firsts = [run(CUCB(VGG19, 0.4, seed=seed), 1)[0] for seed in (0, 1)]
    assert firsts[0] != firsts[1]
    width = len(firsts[0]["features.15"])
    assert 512 * 0.4 * 0.7 < width < 512 * 0.4 * 1.3


def test_cucb_same_seed_same_sequence():
    assert run(CUCB(GROUPS, 0.6, seed=3), 10) == run(CUCB(GROUPS, 0.6, seed=3), 10)


def test_cucb_tau_takes_exactly_tau_random_steps():
    selector = CUCB({"a": 100}, density=0.1, tau=3)
    run(selector, 2)
    assert selector.initialising
    run(selector, 1)
    assert not selector.initialising
    assert selector.state_dict()["time"] == 3
    never = (selector.num_pulls["a"] == 0).nonzero().flatten()
    assert len(never) >= 70
    # an infinite bound: never active comes first, lower index first
    assert as_lists(selector.select()) == {"a": never[:10].tolist()}


def test_cucb_select_twice_is_select_once():
    once, twice = CUCB(VGG19, 0.3), CUCB(VGG19, 0.3)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(8):
        a, first, b = once.select(), twice.select(), twice.select()
        assert as_lists(a) == as_lists(first) == as_lists(b)
        once.update(saliency_for(a, generators[0]))
        twice.update(saliency_for(b, generators[1]))
    same_state(once.state_dict(), twice.state_dict())


def test_cucb_final_changes_nothing():
    selector = CUCB(GROUPS, 0.6)
    for _ in range(4):
        before = selector.state_dict()
        selector.final()
        same_state(before, selector.state_dict())
        run(selector, 1)


def test_cucb_unselectable_groups_are_left_out():
    @dataclass(frozen=True)
    class Group:
        num_channels: int
        selectable: bool

    selector = CUCB({"a": Group(4, True), "last": Group(10, False)}, density=0.5)
    assert selector.groups == {"a": 4} and selector.budget == 2
    assert selector.select().keys() == {"a"}
    selector.update({"a": torch.ones(2), "last": torch.ones(10)})
    assert selector.num_steps == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cucb_takes_saliency_of_any_floating_dtype(dtype):
    selector = started([0.0] * 5)
    selector.select()
    selector.update({"a": torch.tensor([3.0, 4.0], dtype=dtype), "b": torch.ones(1, dtype=dtype)})
    assert selector.mean["a"].tolist() == pytest.approx([0.3, 0.4, 0.0])


# statistics


def test_cucb_regret_falls_and_every_arm_is_pulled():
    generator = torch.Generator().manual_seed(0)
    # 0.7 and more is worth keeping: ten of fifty arms, in two groups
    truth = {name: torch.linspace(0.05, 1.0, 25) for name in ("a", "b")}
    best = sum(float(t.topk(5).values.sum()) for t in truth.values())
    selector = CUCB({"a": 25, "b": 25}, density=0.2, seed=0)
    regret = []
    for _ in range(1500):
        sets = selector.select()
        regret.append(best - sum(float(truth[n][s.indices].sum()) for n, s in sets.items()))
        selector.update(
            {
                name: (truth[name][s.indices] * (0.5 + torch.rand(len(s), generator=generator)))
                for name, s in sets.items()
            }
        )
    early, late = sum(regret[:200]) / 200, sum(regret[-200:]) / 200
    assert late < 0.6 * early
    pulls = torch.cat(list(selector.num_pulls.values()))
    assert int(pulls.min()) > 10
    kept = selector.final()
    assert min(kept["a"].indices.tolist() + kept["b"].indices.tolist()) >= 15


def test_cucb_sets_are_valid_channel_sets():
    # trusted by construction, so that nobody else looks: look here
    selector = CUCB(VGG19, 0.4, round_to=8)
    for _ in range(5):
        sets = selector.select()
        for name, chosen in sets.items():
            assert chosen == ChannelSet(chosen.indices, VGG19[name])
        off_grid = [name for name, chosen in sets.items() if len(chosen) % 8]
        assert len(off_grid) == (1 if selector.budget % 8 else 0)
        selector.update({name: torch.rand(len(s)) for name, s in sets.items()})

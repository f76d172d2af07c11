"""DCP: sequences computed by hand, thresholds, lambda, statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.selectors import DCP

GROUPS = {"a": 3, "b": 2}
VGG16 = {f"features.{i}": n for i, n in enumerate([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6)}


@dataclass(frozen=True)
class Group:
    num_channels: int
    runs: int = 1
    selectable: bool = True


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def tensors(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def utilities(selector):
    return {name: values.tolist() for name, values in selector.utility.items()}


def with_utility(selector, values):
    """The selector, over its warm-up, with these utilities of all groups behind each other."""
    state = selector.state_dict()
    state["utility"] = torch.tensor(values, dtype=torch.float64)
    state["num_steps"] = selector.warmup_steps
    selector.load_state_dict(state)
    return selector


def four_steps(**options):
    """Warm-up and three steps of three channels out of five at lambda = 1/2."""
    selector = DCP(GROUPS, 0.6, decay=0.5, warmup_steps=1, **options)

    # warm-up: everything. theta: a (1, 4, 2) / 4, b (3, 1) / 3
    assert as_lists(selector.select()) == {"a": [0, 1, 2], "b": [0, 1]}
    selector.update(tensors(a=[1.0, 4.0, 2.0], b=[3.0, 1.0]))
    assert utilities(selector) == {"a": [0.25, 1.0, 0.5], "b": [1.0, pytest.approx(1 / 3)]}

    # the best are a1 1, b0 1, a2 .5. theta: a (1, 2) / 2, b 7 / 7
    assert as_lists(selector.select()) == {"a": [1, 2], "b": [0]}
    selector.update(tensors(a=[1.0, 2.0], b=[7.0]))
    # a1 = .5 * 1 + .5, a2 = .5 * .5 + 1, b0 = .5 * 1 + 1
    assert utilities(selector)["a"][1:] == [1.0, 1.25]
    assert utilities(selector)["b"][0] == 1.5

    # groups of zeros: theta is 0, utilities decay only
    assert as_lists(selector.select()) == {"a": [1, 2], "b": [0]}
    selector.update(tensors(a=[0.0, 0.0], b=[0.0]))
    assert utilities(selector)["a"][1:] == [0.5, 0.625]
    assert utilities(selector)["b"][0] == 0.75

    # theta: a (0, 5) / 5, b 2 / 2
    assert as_lists(selector.select()) == {"a": [1, 2], "b": [0]}
    selector.update(tensors(a=[0.0, 5.0], b=[2.0]))
    assert utilities(selector)["a"][1:] == [0.25, 1.3125]
    assert utilities(selector)["b"][0] == 1.375
    return selector


def test_dcp_sequence_by_hand():
    selector = four_steps()
    # inactive channels kept what the warm-up gave them: a0 1/4, b1 1/3, which beats a1 by now
    assert utilities(selector)["a"][0] == 0.25
    assert utilities(selector)["b"][1] == pytest.approx(1 / 3)
    assert as_lists(selector.select()) == {"a": [2], "b": [0, 1]}
    selector.update(tensors(a=[1.0], b=[4.0, 1.0]))
    assert utilities(selector)["a"] == [0.25, 0.25, 1.65625]
    assert utilities(selector)["b"] == [1.6875, pytest.approx(1 / 6 + 1 / 4)]
    assert as_lists(selector.final()) == {"a": [2], "b": [0, 1]}
    assert selector.num_steps == 5


def test_dcp_sequence_by_hand_where_all_utilities_decay():
    selector = four_steps(decay_scope="all")
    # three more halvings: a0 1/32, b1 1/24, so that nothing overtakes a1 .25
    assert utilities(selector)["a"][0] == 1 / 32
    assert utilities(selector)["b"][1] == pytest.approx(1 / 24)
    assert as_lists(selector.select()) == {"a": [1, 2], "b": [0]}


@pytest.mark.parametrize(
    ("initial", "values", "chosen"),
    [
        # all tie: a0 a1 a2, and min_active forces b0 in for a2
        ("zero", {"a": [0.0, 0.0, 0.0], "b": [0.0, 0.0]}, {"a": [0, 1], "b": [0]}),
        ("inverse", {"a": [1 / 3, 1 / 3, 1 / 3], "b": [0.5, 0.5]}, {"a": [0], "b": [0, 1]}),
    ],
)
def test_dcp_initial_utility(initial, values, chosen):
    selector = DCP(GROUPS, 0.6, initial=initial)
    assert utilities(selector) == values
    assert as_lists(selector.select()) == as_lists(selector.final()) == chosen


def test_dcp_lambda_moves_at_its_steps():
    selector = DCP({"a": 2}, 0.5, decay={3: 1.0, 0: 0.5, 2: 0.25})
    # the one active channel has theta 1: 1, then .5 * 1 + 1, .25 * 1.5 + 1, 1 * 1.375 + 1
    for decay, utility in ((0.5, 1.0), (0.5, 1.5), (0.25, 1.375), (1.0, 2.375), (1.0, 3.375)):
        assert selector.present_decay == decay
        assert as_lists(selector.select()) == {"a": [0]}
        selector.update(tensors(a=[7.0]))
        assert utilities(selector) == {"a": [utility, 0.0]}


@pytest.mark.parametrize(
    ("sizes", "density", "budget"),
    [
        (VGG16, 0.6, 2534),  # p N = 1689.6
        ({"a": 5504}, 0.4, 2202),  # p N = 3302.4
        ({"a": 5}, 0.5, 2),  # p N = 2.5: halves are pruned
        ({"a": 5}, 0.9, 4),  # 0.5, whatever 1 - 0.9 is in binary
        ({"a": 10}, 0.29, 3),  # 7.1
        ({"a": 3}, 1.0, 3),
    ],
)
def test_dcp_budget_is_what_pruning_leaves(sizes, density, budget):
    selector = DCP(sizes, density)
    assert selector.budget == budget == sum(map(len, selector.select().values()))


# the strict threshold


@pytest.mark.parametrize(
    ("values", "strict", "chosen"),
    [
        # N = 6, three are pruned. The third smallest of 1 2 2 2 2 3 is 2: only a0 is above it,
        # and b has its best by min_active
        ([3, 2, 2, 2, 2, 1], True, {"a": [0], "b": [0]}),
        # without: a0, then a1 and a2 before b0, which displaces a2
        ([3, 2, 2, 2, 2, 1], False, {"a": [0, 1], "b": [0]}),
        # all equal: nothing is above the threshold
        ([1, 1, 1, 1, 1, 1], True, {"a": [0], "b": [0]}),
        # no ties: three are above .2, all in a; b0 displaces the lowest, the budget stays
        ([3, 2.5, 2.2, 0.1, 0.2, 0.1], True, {"a": [0, 1], "b": [0]}),
        ([3, 2.5, 0.3, 0.1, 2.2, 0.1], True, {"a": [0, 1], "b": [0]}),
    ],
)
def test_dcp_strict_threshold_by_hand(values, strict, chosen):
    selector = with_utility(DCP({"a": 4, "b": 2}, 0.5, strict=strict), values)
    assert as_lists(selector.select()) == as_lists(selector.final()) == chosen


def test_dcp_strict_keeps_everything_at_full_density():
    assert as_lists(DCP(GROUPS, 1.0, strict=True).select()) == {"a": [0, 1, 2], "b": [0, 1]}


@pytest.mark.parametrize(
    ("strict", "chosen"), [(True, {"a": [0, 2], "b": [0]}), (False, {"a": [0, 2], "b": [0, 1]})]
)
def test_dcp_strict_threshold_takes_whole_rows(strict, chosen):
    # rows of a: 3 with 2, and 1 with 2. By their means N = 7 channels have .5, five times 1.5
    # (a1 a3 b0 b1), 2.5, 2.5; three are pruned, so the threshold is 1.5
    selector = DCP({"a": Group(4, 2), "b": Group(3)}, 4 / 7, strict=strict)
    with_utility(selector, [3.0, 1.0, 2.0, 2.0, 1.5, 1.5, 0.5])
    assert as_lists(selector.select()) == chosen


# what utilities do


def test_dcp_at_a_smaller_lambda_goes_on_selecting():
    selector = DCP({"a": 20}, 0.5, decay=0.1, warmup_steps=1)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(30):
        sets = selector.select()
        seen.add(str(as_lists(sets)))
        selector.update({"a": torch.rand(len(sets["a"]), generator=generator)})
    assert len(seen) > 5


def test_dcp_warm_up_finds_the_best_channels():
    truth = {name: torch.linspace(0.05, 1.0, 25) for name in ("a", "b")}
    generator = torch.Generator().manual_seed(0)
    selector = DCP({"a": 25, "b": 25}, 0.2, decay=0.9, warmup_steps=40)
    for _ in range(40):
        assert selector.warming_up
        noise = {n: 0.8 + 0.4 * torch.rand(25, generator=generator) for n in truth}
        assert all(s.is_full for s in selector.select().values())
        selector.update({n: truth[n] * noise[n] for n in truth})
    assert not selector.warming_up
    kept = selector.select()
    assert sum(map(len, kept.values())) == 10
    assert min(kept["a"].indices.tolist() + kept["b"].indices.tolist()) >= 18


# what every selector promises


def test_dcp_select_twice_is_select_once():
    once, twice = (DCP(VGG16, 0.3, warmup_steps=2) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        a, first, b = once.select(), twice.select(), twice.select()
        assert as_lists(a) == as_lists(first) == as_lists(b)
        saliency = {name: torch.rand(len(s), generator=generator) for name, s in a.items()}
        once.update(saliency)
        twice.update(saliency)
        twice.final()
    assert utilities(once) == utilities(twice)
    assert once.num_steps == twice.num_steps == 6


def test_dcp_an_unchanged_selection_is_the_same_object():
    selector = DCP(GROUPS, 0.6, decay=1.0)
    first = selector.select()
    selector.update(tensors(a=[1.0, 2.0], b=[1.0]))
    assert all(selector.select()[name] is chosen for name, chosen in first.items())


def test_dcp_sets_are_valid_channel_sets():
    # trusted by construction, so that nobody else looks: look here
    selector = DCP(VGG16, 0.4, warmup_steps=1, round_to=8)
    for step in range(4):
        sets = selector.select()
        for name, chosen in sets.items():
            assert chosen == ChannelSet(chosen.indices, VGG16[name])
        if step:
            off_grid = [name for name, chosen in sets.items() if len(chosen) % 8]
            assert len(off_grid) == (1 if selector.budget % 8 else 0)
        selector.update({name: torch.rand(len(s)) for name, s in sets.items()})


def test_dcp_unselectable_groups_are_left_out():
    selector = DCP({"a": Group(4), "last": Group(10, selectable=False)}, 0.5)
    assert selector.groups == {"a": 4} and selector.budget == 2
    assert selector.select().keys() == {"a"}
    selector.update({"a": torch.ones(2), "last": torch.ones(10)})
    assert utilities(selector) == {"a": [1.0, 1.0, 0.0, 0.0]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dcp_takes_saliency_of_any_floating_dtype(dtype):
    selector = DCP(GROUPS, 0.6)
    selector.select()
    selector.update({"a": torch.tensor([3.0, 4.0], dtype=dtype), "b": torch.ones(1, dtype=dtype)})
    assert utilities(selector) == {"a": [0.75, 1.0, 0.0], "b": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({}, {}, "at least one selectable group"),
        ({"a": 0}, {}, "a: expected a positive number of channels, got 0"),
        (GROUPS, {"density": 0.0}, r"density in \(0, 1\], got 0.0"),
        (GROUPS, {"density": math.nan}, "density"),
        (GROUPS, {"density": 0.2}, r"a budget of 2 \(min_active=1 in 2 groups\).*got 1"),
        (GROUPS, {"decay": 1.1}, "decay from 0 to 1, got 1.1"),
        (GROUPS, {"decay": math.nan}, "decay from 0 to 1, got nan"),
        (GROUPS, {"decay": True}, "decay from 0 to 1, got True"),
        (GROUPS, {"decay": "increase"}, "decay from 0 to 1, got 'increase'"),
        (GROUPS, {"decay": {5: 0.7}}, r"decay from step 0 on.*got \[5\]"),
        (GROUPS, {"decay": {0: 0.6, -5: 0.7}}, r"whole numbers, got \[0, -5\]"),
        (GROUPS, {"warmup_steps": -1}, "warmup_steps to be an int of at least 0, got -1"),
        (GROUPS, {"warmup_steps": 1.5}, "warmup_steps"),
        (GROUPS, {"decay_scope": "some"}, "decay_scope out of .*, got 'some'"),
        (GROUPS, {"initial": "random"}, "initial out of .*, got 'random'"),
        (GROUPS, {"strict": "no"}, "strict out of .*, got 'no'"),
        (GROUPS, {"round_to": 1.5}, "round_to"),
        ({"a": Group(8, 3)}, {}, "a: expected .* divides the 8 channels, got 3"),
    ],
)
def test_dcp_constructor_names_the_argument(groups, options, message):
    with pytest.raises(ValueError, match=message):
        DCP(groups, **{"density": 0.6, **options})

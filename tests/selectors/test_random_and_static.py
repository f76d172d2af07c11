"""The two selectors without statistics."""

from __future__ import annotations

import pytest
import torch

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.selectors import CUCB, DCP, Random, Selector, Static

GROUPS = {"a": 30, "b": 10}


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def test_random_draws_new_sets_of_exactly_the_budget():
    selector = Random(GROUPS, 0.5, min_active=3)
    seen = set()
    for _ in range(20):
        sets = selector.select()
        assert sum(map(len, sets.values())) == selector.budget == 20
        assert min(map(len, sets.values())) >= 3
        seen.add(str(as_lists(sets)))
        selector.update({})
    assert len(seen) == 20


def test_random_is_uniform():
    selector = Random(GROUPS, 0.5)
    hits = torch.zeros(40)
    for _ in range(2000):
        sets = selector.select()
        hits += torch.cat([s.mask() for s in sets.values()])
    # 1000 +- 22 each; six deviations
    assert int((hits - 1000).abs().max()) < 134


def test_random_final_depends_on_the_seed_only():
    selector = Random(GROUPS, 0.5, seed=1)
    final = as_lists(selector.final())
    state = selector.state_dict()["generator"]
    assert sum(map(len, final.values())) == 20
    selector.select()
    assert as_lists(selector.final()) == final == as_lists(Random(GROUPS, 0.5, seed=1).final())
    assert final != as_lists(Random(GROUPS, 0.5, seed=2).final())
    fresh = Random(GROUPS, 0.5, seed=1)
    fresh.final()
    assert torch.equal(fresh.state_dict()["generator"], state)
    assert as_lists(fresh.select()) != final


def test_random_round_to():
    selector = Random(GROUPS, 0.6, round_to=4)
    for _ in range(5):
        assert all(len(s) % 4 == 0 for s in selector.select().values())


def test_random_state_round_trip():
    whole = Random(GROUPS, 0.5, seed=4)
    whole.select()
    resumed = Random(GROUPS, 0.5, seed=4)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(3):
        assert as_lists(whole.select()) == as_lists(resumed.select())


def test_random_load_refuses_another_density():
    selector = Random(GROUPS, 0.5)
    before = selector.state_dict()["generator"]
    state = Random(GROUPS, 0.4, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"density=0\.5, got density=0\.4"):
        selector.load_state_dict(state)
    assert torch.equal(selector.state_dict()["generator"], before)


def static():
    return Static({"a": ChannelSet([1, 5], 30), "b": ChannelSet([0], 10)})


def test_static_never_changes():
    selector = static()
    before = as_lists(selector.select())
    selector.update({"a": torch.tensor([float("nan")])})
    assert as_lists(selector.select()) == as_lists(selector.final()) == before
    assert before == {"a": [1, 5], "b": [0]}
    assert selector.budget == 3 and selector.groups == GROUPS


def test_static_state_carries_the_sets():
    other = Static({"a": ChannelSet([2], 30), "b": ChannelSet([3, 4], 10)})
    other.load_state_dict(static().state_dict())
    assert as_lists(other.select()) == {"a": [1, 5], "b": [0]}


def test_static_load_refuses_an_empty_group():
    selector = static()
    state = selector.state_dict()
    state["mask"][:30] = False
    with pytest.raises(ValueError, match="a: expected at least one channel, got an empty set"):
        selector.load_state_dict(state)
    assert as_lists(selector.select()) == {"a": [1, 5], "b": [0]}


def test_static_refuses_nothing():
    with pytest.raises(ValueError, match="at least one set"):
        Static({})


def test_only_statistics_need_saliency():
    assert Selector.needs_saliency and CUCB.needs_saliency and DCP.needs_saliency
    assert not Random.needs_saliency and not Static.needs_saliency

"""What CUCB saves, loads and refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dcx_kernels.errors import NonFiniteError
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


def through_disk(state):
    """What a checkpoint does: tensors as they are, the rest through JSON."""
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    return {**tensors, **json.loads(json.dumps(rest))}


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 20])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("tau", [None, 7])
def test_cucb_state_round_trip_is_exact(steps, pending, tau):
    whole = CUCB(VGG19, 0.3, tau=tau, seed=5)
    run(whole, steps, seed=1)
    if pending:
        whole.select()
    state = through_disk(whole.state_dict())
    resumed = CUCB(VGG19, 0.3, tau=tau, seed=5)
    resumed.load_state_dict(state)
    same_state(whole.state_dict(), resumed.state_dict())
    assert run(whole, 6, seed=2) == run(resumed, 6, seed=2)
    same_state(whole.state_dict(), resumed.state_dict())


def test_cucb_state_is_a_copy():
    selector = CUCB(GROUPS, 0.6)
    before = selector.state_dict()
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in before.items()}
    run(selector, 5)
    same_state(before, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.5}, "density=0.6, got density=0.5"),
        ({"tau": 4}, "tau=None, got tau=4"),
        ({"seed": 1}, "seed=0, got seed=1"),
        ({"groups": json.dumps({"a": 3, "b": 4})}, r"group 'b' to be as in the selector \(2\)"),
        ({"groups": json.dumps({"a": 3})}, "group 'b' .* no such group in the state"),
        ({"groups": json.dumps({"b": 2, "a": 3})}, "groups in the order"),
        ({"groups": "{"}, "JSON of"),
        ({"kind": "Random"}, "the state of a CUCB, got 'Random'"),
        ({"extra": 1}, "only known entries in the state, got 'extra'"),
        ({"mean": torch.zeros(4, dtype=torch.float64)}, r"'mean'.*shape \(5,\), got .*\(4,\)"),
        ({"mean": torch.zeros(5)}, "'mean'.*float64.*got a torch.float32"),
        ({"mean": torch.full((5,), math.nan, dtype=torch.float64)}, "possible 'mean'"),
        ({"num_pulls": torch.full((5,), -1)}, "possible 'num_pulls'"),
        ({"num_steps": "2"}, "'num_steps': expected int, got '2'"),
        ({"time": -1}, "possible 'time' in the state, got -1"),
        ({"pending": torch.tensor([True, True, True, False, False])}, "possible 'pending'"),
        ({"generator": torch.zeros(7, dtype=torch.uint8)}, "'generator'"),
        ({"generator": torch.full((5056,), 255, dtype=torch.uint8)}, "a generator's state"),
    ],
)
def test_cucb_load_refuses_and_changes_nothing(change, message):
    donor = CUCB(GROUPS, 0.6)
    run(donor, 4)
    state = {**donor.state_dict(), **change}
    selector = CUCB(GROUPS, 0.6)
    run(selector, 3, seed=9)
    selector.select()
    before = selector.state_dict()
    with pytest.raises(ValueError, match=message):
        selector.load_state_dict(state)
    same_state(before, selector.state_dict())


def test_cucb_load_names_a_missing_entry():
    selector = CUCB(GROUPS, 0.6)
    state = selector.state_dict()
    del state["mean"]
    with pytest.raises(ValueError, match="an entry 'mean' in the state, got none"):
        selector.load_state_dict(state)


# refusals


@pytest.mark.parametrize(
    ("saliency", "error", "message"),
    [
        (tensors(a=[1.0, math.nan], b=[1.0]), NonFiniteError, "a: expected finite .* got nan"),
        (tensors(a=[1.0, 1.0], b=[math.inf]), NonFiniteError, "b: expected finite .* got inf"),
        (tensors(a=[1.0], b=[1.0]), ValueError, "a: expected .* the 2 channels .* got 1 values"),
        (tensors(a=[1.0, 1.0]), ValueError, "b: expected saliency of every selected group"),
        (tensors(a=[1.0, 1.0], b=[1.0], c=[1.0]), ValueError, "got 'c'"),
        ({"a": torch.ones(2, 1), "b": torch.ones(1)}, ValueError, r"a: .* shape \(2, 1\)"),
        ({"a": torch.ones(2).long(), "b": torch.ones(1)}, ValueError, "a: .* got torch.int64"),
    ],
)
def test_cucb_update_refuses_and_changes_nothing(saliency, error, message):
    selector = started([0.6, 0.8, 0.1, 0.9, 0.2])
    assert as_lists(selector.select()) == {"a": [0, 1], "b": [0]}
    before = selector.state_dict()
    with pytest.raises(error, match=message):
        selector.update(saliency)
    same_state(before, selector.state_dict())
    selector.update(tensors(a=[3.0, 4.0], b=[7.0]))  # the pending selection is still there


def test_cucb_update_without_select_is_refused():
    selector = CUCB(GROUPS, 0.6)
    with pytest.raises(RuntimeError, match=r"expected select\(\) before update\(\)"):
        selector.update(tensors(a=[1.0], b=[1.0]))
    run(selector, 1)
    with pytest.raises(RuntimeError, match="no selection to update"):
        selector.update(tensors(a=[1.0], b=[1.0]))


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({}, {}, "at least one selectable group"),
        ({"a": 0}, {}, "a: expected a positive number of channels, got 0"),
        ({"a": True}, {}, "a: expected a positive number of channels, got True"),
        (GROUPS, {"density": 0.0}, "density"),
        (GROUPS, {"density": 0.2}, r"a budget of 2 \(min_active=1 in 2 groups\).*got 1"),
        (GROUPS, {"tau": 0}, "tau to be None or an int of at least 1, got 0"),
        (GROUPS, {"round_to": 1.5}, "round_to"),
    ],
)
def test_cucb_constructor_names_the_argument(groups, options, message):
    with pytest.raises(ValueError, match=message):
        CUCB(groups, **options)

"""What DCP saves, loads and refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dcx_kernels.errors import NonFiniteError
from dcx_kernels.selectors import DCP, utility_decay

GROUPS = {"a": 3, "b": 2}
SIZES = {"a": 64, "b": 7, "c": 100, "d": 3, "e": 33}
OPTIONS = {"decay": utility_decay("increase", [4, 8]), "warmup_steps": 2}


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def tensors(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def run(selector, steps, seed=0):
    """Take ``steps`` steps with seeded random saliency; return what was selected."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        sets = selector.select()
        history.append(as_lists(sets))
        selector.update({n: torch.rand(len(s), generator=generator) for n, s in sets.items()})
    return history


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key] and type(value) is type(b[key]), key


def through_disk(state):
    """What a checkpoint does: tensors as they are, the rest through JSON."""
    stored = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    return {**stored, **json.loads(json.dumps(rest))}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"strict": True, "initial": "inverse"}, {"decay_scope": "all", "round_to": 4}],
    ids=["default", "strict", "all"],
)
def test_dcp_state_round_trip_is_exact(steps, pending, more):
    whole, resumed = (DCP(SIZES, 0.3, **OPTIONS, **more) for _ in range(2))
    run(whole, steps)
    if pending:
        whole.select()
    resumed.load_state_dict(through_disk(whole.state_dict()))
    assert_same_state(whole.state_dict(), resumed.state_dict())
    if pending:  # an update may follow at once
        saliency = {name: torch.rand(len(s)) for name, s in whole.select().items()}
        whole.update(saliency)
        resumed.update(saliency)
    assert run(whole, 6, seed=2) == run(resumed, 6, seed=2)
    assert_same_state(whole.state_dict(), resumed.state_dict())


def test_dcp_state_is_a_copy():
    selector = DCP(GROUPS, 0.6)
    before = selector.state_dict()
    run(selector, 3)
    assert before["utility"].tolist() == [0.0] * 5
    selector.load_state_dict(before)
    run(selector, 3)
    assert before["utility"].tolist() == [0.0] * 5
    selector.utility["a"].zero_()
    assert float(selector.utility["a"].max()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.5}, r"density=0\.6, got density=0\.5"),
        ({"decay": "[[0, 0.5]]"}, "decay="),
        ({"warmup_steps": 3}, "warmup_steps=2, got warmup_steps=3"),
        ({"strict": True}, "strict=False, got strict=True"),
        ({"decay_scope": "all"}, "decay_scope=selected, got decay_scope=all"),
        ({"initial": "inverse"}, "initial=zero, got initial=inverse"),
        ({"min_active": 2}, "min_active=1, got min_active=2"),
        ({"round_to": 8}, "round_to=1, got round_to=8"),
        ({"groups": json.dumps({"a": 3, "b": 4})}, r"group 'b' to be as in the selector \(2\)"),
        ({"kind": "CUCB"}, "the state of a DCP, got 'CUCB'"),
        ({"extra": 1}, "only known entries in the state, got 'extra'"),
        ({"utility": torch.zeros(4, dtype=torch.float64)}, r"shape \(5,\), got .*\(4,\)"),
        ({"utility": torch.zeros(5)}, "'utility'.*float64.*got a torch.float32"),
        ({"utility": torch.full((5,), math.nan, dtype=torch.float64)}, "possible 'utility'"),
        ({"utility": torch.full((5,), math.inf, dtype=torch.float64)}, "possible 'utility'"),
        ({"num_steps": "2"}, "'num_steps': expected int, got '2'"),
        ({"num_steps": -1}, "possible 'num_steps' in the state, got -1"),
        ({"pending": 1}, "'pending': expected bool, got 1"),
    ],
)
def test_dcp_load_refuses_and_changes_nothing(change, message):
    donor = DCP(GROUPS, 0.6, **OPTIONS)
    run(donor, 4)
    state = {**donor.state_dict(), **change}
    selector = DCP(GROUPS, 0.6, **OPTIONS)
    run(selector, 3, seed=9)
    selector.select()
    before = selector.state_dict()
    with pytest.raises(ValueError, match=message):
        selector.load_state_dict(state)
    assert_same_state(before, selector.state_dict())


def test_dcp_load_names_a_missing_entry():
    selector = DCP(GROUPS, 0.6)
    state = selector.state_dict()
    del state["utility"]
    with pytest.raises(ValueError, match="an entry 'utility' in the state, got none"):
        selector.load_state_dict(state)


@pytest.mark.parametrize(
    ("saliency", "error", "message"),
    [
        (tensors(a=[1.0, math.nan], b=[1.0]), NonFiniteError, "a: expected finite .* got nan"),
        (tensors(a=[1.0, 1.0], b=[math.inf]), NonFiniteError, "b: expected finite .* got inf"),
        (tensors(a=[1.0], b=[1.0]), ValueError, "a: expected .* the 2 channels .* got 1 values"),
        (tensors(a=[1.0, 1.0]), ValueError, "b: expected saliency of every selected group"),
        (tensors(a=[1.0, 1.0], b=[1.0], c=[1.0]), ValueError, "got 'c'"),
    ],
)
def test_dcp_update_refuses_and_changes_nothing(saliency, error, message):
    selector = DCP(GROUPS, 0.6, decay_scope="all")
    run(selector, 2)
    assert as_lists(selector.select()) == {"a": [0, 1], "b": [0]}
    before = selector.state_dict()
    with pytest.raises(error, match=message):
        selector.update(saliency)
    assert_same_state(before, selector.state_dict())
    selector.update(tensors(a=[3.0, 4.0], b=[7.0]))  # the pending selection is still there


def test_dcp_update_without_select_is_refused():
    selector = DCP(GROUPS, 0.6)
    for _ in range(2):  # new, and after a step
        with pytest.raises(RuntimeError, match=r"expected select\(\) before update\(\)"):
            selector.update(tensors(a=[1.0, 1.0], b=[1.0]))
        run(selector, 1)

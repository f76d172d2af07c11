"""How lambda of DCP moves."""

from __future__ import annotations

import pytest

from dcx_kernels.selectors import DCP, utility_decay


@pytest.mark.parametrize(
    ("policy", "milestones", "first", "decay"),
    [
        ("increase", [100, 200], 0.6, {0: 0.6, 100: 0.7, 200: 1.0}),
        ("increase", [36, 48, 54], 0.6, {0: 0.6, 36: 0.7, 48: 0.8, 54: 1.0}),
        ("increase", [1, 2, 3, 4], 0.8, {0: 0.8, 1: 0.9, 2: 1.0, 3: 1.0, 4: 1.0}),
        ("increase", [], 0.6, {0: 0.6}),
        ("divide", [100, 200], 0.6, {0: 0.6, 100: 0.06, 200: 0.006}),
        ("constant", [100, 200], 0.5, {0: 0.5}),
    ],
)
def test_utility_decay_policies(policy, milestones, first, decay):
    assert utility_decay(policy, milestones, first) == decay
    assert DCP({"a": 4}, 0.5, decay=utility_decay(policy, milestones, first)).decay == decay


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drop", [1]), "a policy out of .*'constant'.*, got 'drop'"),
        (("increase", [0, 2]), r"milestones that rise from 1 on, got \[0, 2\]"),
        (("divide", [5, 5]), r"milestones that rise from 1 on, got \[5, 5\]"),
    ],
)
def test_utility_decay_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        utility_decay(*arguments)

"""Groups without runs: what is selected is a matter of record and does not change."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest
import torch

from dcx_kernels.selectors import CUCB, Random, global_top

SIZES = {"a": 64, "b": 7, "c": 100, "d": 3, "e": 33}


@dataclass(frozen=True)
class Group:
    num_channels: int
    selectable: bool = True
    runs: int = 1


def made_up(count, salt):
    """Numbers in [0, 1) with repetitions, the same on every machine."""
    return (torch.arange(count, dtype=torch.int64) * 7919 + salt * 104729) % 61 / 64


def history(selector, steps):
    """Everything ``steps`` steps and the end of a selector show, in one digest."""
    digest = hashlib.sha256()
    for step in range(steps):
        sets = selector.select()
        digest.update(repr([s.indices.tolist() for s in sets.values()]).encode())
        selector.update({name: made_up(len(s), step) for name, s in sets.items()})
    digest.update(repr([s.indices.tolist() for s in selector.final().values()]).encode())
    for value in selector.state_dict().values():
        digest.update(repr(value.tolist() if isinstance(value, torch.Tensor) else value).encode())
    return digest.hexdigest()[:16]


# recorded before selectors knew of runs
@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({"density": 0.4}, "5f150732a700318c"),
        ({"density": 0.11, "min_active": 3}, "edb53487337d80d8"),
        ({"density": 0.6, "round_to": 8, "seed": 3}, "f582b030aba1dd2c"),
        ({"density": 0.35, "tau": 4, "min_active": 2, "round_to": 4}, "8ce4d7c83dd70d3c"),
        ({"density": 1.0}, "d850621170702682"),
    ],
)
@pytest.mark.parametrize("group", [int, Group])
def test_cucb_selects_what_it_always_did(options, digest, group):
    groups = {name: group(size) for name, size in SIZES.items()}
    assert history(CUCB(groups, **options), 25) == digest


@pytest.mark.parametrize("group", [int, Group])
def test_random_selects_what_it_always_did(group):
    groups = {name: group(size) for name, size in SIZES.items()}
    assert history(Random(groups, 0.3, min_active=2, round_to=4, seed=7), 10) == "311023b369086adb"


@pytest.mark.parametrize(("round_to", "digest"), [(1, "694fd40459eef0c0"), (6, "70437e46e532bae5")])
def test_global_top_selects_what_it_always_did(round_to, digest):
    scores = {name: made_up(size, size) for name, size in SIZES.items()}
    chosen = [
        [s.indices.tolist() for s in global_top(scores, budget, 2, round_to).values()]
        for budget in range(10, 208, 9)
    ]
    assert hashlib.sha256(repr(chosen).encode()).hexdigest()[:16] == digest

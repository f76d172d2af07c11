"""Nested state survives the way through names and JSON."""

from __future__ import annotations

import json

import pytest
import torch

from dcx_kernels.train.tree import flatten, unflatten


def test_flatten_round_trip_through_json() -> None:
    a, b = torch.arange(3), torch.tensor(2.5)
    tree = {
        "plain": {"x": 1, "y": [1.5, None, True, "s"], "z": a},
        "int keys": {0: {"step": b}, 7: {}},
        "tuple": (0.9, 0.999),
        "$odd": {"$tensor": 3},
    }
    structure, tensors = flatten(tree)
    assert tensors == {"plain/z": a, "int keys/0/step": b}
    back = unflatten(json.loads(json.dumps(structure)), tensors)
    assert back == tree
    assert isinstance(back["tuple"], tuple)


def test_flatten_refuses_other_leaves() -> None:
    with pytest.raises(TypeError, match=r"a/b: expected tensors and JSON scalars.*got set"):
        flatten({"a": {"b": {1, 2}}})


def test_flatten_keeps_floats_exactly() -> None:
    values = [0.1, 1e-300, 2.0**-1074, 1 / 3]
    structure, _ = flatten(values)
    assert json.loads(json.dumps(structure)) == values

"""Nested state (dicts, lists, scalars, tensors) as named tensors plus JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dcx_kernels.errors import expected

__all__ = ["Tree", "flatten", "unflatten"]

Tree = Any
"""None, bool, int, float, str, Tensor, or a list, tuple or dict of Trees."""

_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def flatten(tree: Tree, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into a JSON structure and its tensors.

    Args:
        tree: the state. Keys of dicts are strings or ints.
        name: prefix of the tensors' names.

    Returns:
        The structure, in which ``{"$tensor": name}`` stands for a tensor, and the tensors by name.

    Raises:
        TypeError: on a leaf that is neither a tensor nor a JSON scalar.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(tree, name, tensors), tensors


def unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """Put the tensors back where `flatten` took them from.

    Raises:
        KeyError: if the structure names a tensor that is not in ``tensors``.
    """
    if isinstance(structure, list):
        return [unflatten(value, tensors) for value in structure]
    if not isinstance(structure, dict):
        return structure
    if _TENSOR in structure:
        return tensors[structure[_TENSOR]]
    if _TUPLE in structure:
        return tuple(unflatten(value, tensors) for value in structure[_TUPLE])
    if _ITEMS in structure:
        return {key: unflatten(value, tensors) for key, value in structure[_ITEMS]}
    return {key: unflatten(value, tensors) for key, value in structure.items()}


def _flatten(tree: Tree, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {_TENSOR: name}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, list | tuple):
        values = [_flatten(v, _join(name, i), tensors) for i, v in enumerate(tree)]
        return values if isinstance(tree, list) else {_TUPLE: values}
    if isinstance(tree, Mapping):
        items = [(k, _flatten(v, _join(name, k), tensors)) for k, v in tree.items()]
        # json turns int keys (torch's optimizer state) into strings: keep those as pairs
        if all(isinstance(k, str) and not k.startswith("$") for k, _ in items):
            return dict(items)
        return {_ITEMS: [list(item) for item in items]}
    raise TypeError(expected("tensors and JSON scalars in the state", type(tree).__name__, name))


def _join(prefix: str, key: object) -> str:
    return f"{prefix}/{key}" if prefix else str(key)

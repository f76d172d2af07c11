"""Fusing neighbours: a batch norm applies the ReLU behind it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from dcx_kernels.nn import SparseChannelBatchNorm2d

__all__ = ["fuse_relu"]


def fuse_relu(root: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
    """Let a batch norm apply the ReLU that is its only reader, wherever it is called."""
    modules = dict(root.named_modules(remove_duplicate=False))
    readers: dict[nn.Module, list[tuple[fx.Node, fx.Node | None]]] = {}
    for graph in graphs.values():
        for node in graph.nodes:
            norm = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(norm, SparseChannelBatchNorm2d):
                users = list(node.users)
                only = users[0] if len(users) == 1 and _is_relu(users[0], modules) else None
                readers.setdefault(norm, []).append((node, only))
    for norm, calls in readers.items():
        if any(relu is None for _, relu in calls):
            continue
        assert isinstance(norm, SparseChannelBatchNorm2d)
        norm.relu = True
        for node, relu in calls:
            assert relu is not None
            relu.replace_all_uses_with(node)
            node.graph.erase_node(relu)


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    functions = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)
    return node.op == "call_function" and node.target in functions

"""Fusing neighbours: a batch norm applies the ReLU behind it, a convolution the norm behind it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from dcx_kernels.graph.edit import add_helper
from dcx_kernels.nn import SparseChannelBatchNorm2d, SparseChannelConv2d
from dcx_kernels.nn.conv_norm import ConvNormUnit, fusable

__all__ = ["fuse_conv_norm", "fuse_relu"]

Calls = dict[nn.Module, list[fx.Node]]


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


def fuse_conv_norm(root: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
    """Put a `ConvNormUnit` in the place of a convolution and the norm that alone reads it.

    Neither is called twice in a graph. Where only convolutions read a unit whose norm has a ReLU,
    they become units too, and are given what the first one has not activated.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    pairs = _pairs(modules, graphs)
    units: dict[SparseChannelConv2d, str] = {}

    def unit(node: fx.Node, conv: SparseChannelConv2d) -> fx.Node:
        if conv not in units:
            units[conv] = add_helper(root, "unit", ConvNormUnit(conv, pairs.get(conv)))
        with node.graph.inserting_before(node):
            return node.graph.call_module(units[conv], node.args)

    for graph in graphs.values():
        calls = _calls(modules, graph)
        made: dict[fx.Node, SparseChannelConv2d] = {}
        for conv, norm in pairs.items():
            for call in calls.get(conv, ()):
                (behind,) = calls[norm]
                new = unit(call, conv)  # at the convolution: what it reads may change later
                behind.replace_all_uses_with(new)
                graph.erase_node(behind)
                graph.erase_node(call)
                made[new] = conv
        lone: dict[fx.Node, SparseChannelConv2d] = {}
        for layer, nodes in calls.items():
            if isinstance(layer, SparseChannelConv2d) and layer not in pairs and fusable(layer):
                lone |= {nodes[0]: layer} if len(nodes) == 1 and _reads_one(nodes[0]) else {}
        for node, conv in list(made.items()):
            readers = list(node.users)
            if not pairs[conv].relu or not readers:
                continue
            if any(reader not in made and reader not in lone for reader in readers):
                continue
            node.kwargs = {"raw": True}
            for reader in readers:
                if reader in lone:
                    reader.replace_all_uses_with(unit(reader, lone.pop(reader)))
                    graph.erase_node(reader)


def _pairs(
    modules: Mapping[str, nn.Module], graphs: Mapping[bool, fx.Graph]
) -> dict[SparseChannelConv2d, SparseChannelBatchNorm2d]:
    """Return the norm behind each convolution that can be fused with it in every graph."""
    every = [_calls(modules, graph) for graph in graphs.values()]
    found: dict[SparseChannelConv2d, SparseChannelBatchNorm2d] = {}
    for calls in every:
        norms = {nodes[0]: norm for norm, nodes in calls.items() if len(nodes) == 1}
        for conv, nodes in calls.items():
            norm = norms.get(next(iter(nodes[0].users), nodes[0]))
            if isinstance(conv, SparseChannelConv2d) and isinstance(norm, SparseChannelBatchNorm2d):
                found[conv] = norm
    return {
        conv: norm
        for conv, norm in found.items()
        if fusable(conv) and all(_are_neighbours(conv, norm, calls) for calls in every)
    }


def _are_neighbours(conv: nn.Module, norm: nn.Module, calls: Calls) -> bool:
    """Tell whether, in one graph, each is called once and for the other, or neither is."""
    if conv not in calls and norm not in calls:
        return True
    first, second = calls.get(conv, []), calls.get(norm, [])
    if len(first) != 1 or len(second) != 1:
        return False
    users = list(first[0].users)
    return users == second and _reads_one(first[0]) and _reads_one(second[0])


def _reads_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _calls(modules: Mapping[str, nn.Module], graph: fx.Graph) -> Calls:
    calls: Calls = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(modules[str(node.target)], []).append(node)
    return calls


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    functions = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)
    return node.op == "call_function" and node.target in functions

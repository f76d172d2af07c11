"""Editing a traced graph: a copy, with other nodes where the steps say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from dcx_kernels.graph.rules.reshape import sizes_of
from dcx_kernels.graph.structure import Traced, flattens
from dcx_kernels.graph.walk import Consume, Flatten, Join, Step

__all__ = ["add_helper", "compiled", "edited", "flatten"]

# (graph, copy of the step's node, step, inputs of the step in the copy) -> its new value, or None
Edit = Callable[[fx.Graph, fx.Node, Step, list[fx.Node]], "fx.Node | None"]


def edited(traced: Traced, edit: Edit) -> fx.Graph:
    """Return a copy of a graph in which ``edit`` replaced the values of steps."""
    graph, of = fx.Graph(), dict[fx.Node, fx.Node]()
    returned = graph.graph_copy(traced.graph, of)
    graph.output(returned)
    for node, step in traced.steps.items():
        copy = of[node]
        inputs = [of[source] for source in _sources(node, step)]
        with graph.inserting_before(copy):
            new = edit(graph, copy, step, inputs)
        if new is None or new is copy:
            continue
        copy.replace_all_uses_with(new)
        of[node] = new
        _erase(graph, copy)
    return graph


def _sources(node: fx.Node, step: Step) -> list[fx.Node]:
    """Return the nodes whose channels a step works on."""
    if isinstance(step, Consume):
        return [node.all_input_nodes[0]]
    if isinstance(step, Join):
        return [term for term, _ in step.terms]
    return [step.source]


def flatten(graph: fx.Graph, node: fx.Node, step: Flatten, inputs: list[fx.Node]) -> fx.Node | None:
    """Do what the step says, unless the node does just that for every width."""
    x = inputs[0]
    if step.apart:
        batch, _, *pixels = sizes_of(node)
        channels = graph.call_method("size", (x, 1))
        return graph.call_method("reshape", (x, batch, channels, *pixels))
    return None if flattens(node) else graph.call_function(torch.flatten, (x, 1))


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read; layers stay."""
    if node.users or node._erased or node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        _erase(graph, source)


def add_helper(root: nn.Module, kind: str, helper: nn.Module) -> str:
    """Give ``helper`` a place in ``root``; it adds nothing to the state_dict."""
    number = 0
    while hasattr(root, f"_dcx_{kind}_{number}"):
        number += 1
    root.add_module(f"_dcx_{kind}_{number}", helper)
    return f"_dcx_{kind}_{number}"


def compiled(root: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Return the graph as a function of (module, *inputs) that looks layers up in ``module``."""
    forward: Callable[..., Any] = type(fx.GraphModule(root, graph)).forward
    return forward

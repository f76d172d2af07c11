"""Thin networks whose compact tensors meet or part: torch.fx graphs of plain torch operations."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from dcx_kernels.graph.edit import compiled, edited, flatten
from dcx_kernels.graph.joints import places, selection
from dcx_kernels.graph.layout import Ids
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.structure import Traced
from dcx_kernels.graph.walk import Flatten, Join, Select, Step

__all__ = ["ThinModule", "thin_graphs", "thin_module"]


def thin_graphs(model: ChannelModel, layers: nn.Module) -> dict[bool, fx.Graph]:
    """Return the graphs of the current selection; index lists become buffers of ``layers``."""
    cut = _Cut(model, layers)
    return {mode: cut.graph(traced) for mode, traced in model.structure.programs.items()}


class _Cut:
    """Writes what the steps do to fixed channels, in plain torch operations.

    A sum over the union of channels pads each term with one channel of zeros and selects from it:
    exporters understand that better than index_add. A layer whose channels are all gone works on
    one channel of zeros, because torch's refuse to work on none.
    """

    def __init__(self, model: ChannelModel, layers: nn.Module) -> None:
        self._axes = model.structure.axes
        self._sets = model.layer_sets
        self._layers = layers
        self._device = next(model.parameters()).device
        self._buffers: dict[bytes, str] = {}

    def graph(self, traced: Traced) -> fx.Graph:
        """Return one graph of the thin network."""

        def edit(
            graph: fx.Graph, node: fx.Node, step: Step, inputs: list[fx.Node]
        ) -> fx.Node | None:
            if isinstance(step, Flatten):
                return flatten(graph, node, step, inputs)
            if isinstance(step, Select):
                return self._select(graph, inputs[0], step)
            rank = len(traced.shapes[node.name])
            if isinstance(step, Join):
                terms = [
                    self._place(graph, x, layout.ids, step.out.ids, rank)
                    for x, (_, layout) in zip(inputs, step.terms, strict=True)
                ]
                return graph.call_function(torch.add, tuple(terms))
            if not self._sets.mask(step.layout.ids).any():
                node.replace_input_with(inputs[0], _padded(graph, inputs[0], rank))
            return None

        graph = edited(traced, edit)
        for node in list(graph.nodes):
            if node.op == "call_module" and self._works_on_nothing(str(node.target)):
                _work_on_zeros(graph, node, len(traced.shapes[node.name]))
        return graph

    def _select(self, graph: fx.Graph, x: fx.Node, step: Select) -> fx.Node:
        """Slice where the channels follow each other, else index."""
        source = step.layout.ids
        chosen, start = selection(self._sets, source, step.positions, step.out.ids)
        if start is None:
            return graph.call_function(torch.index_select, (x, 1, self._index(graph, chosen)))
        if len(chosen) == self._sets.mask(source).sum():
            return x
        return graph.call_function(torch.narrow, (x, 1, start, len(chosen)))

    def _place(self, graph: fx.Graph, x: fx.Node, term: Ids, out: Ids, rank: int) -> fx.Node:
        """Bring a term's channels to their places in the sum, zeros between them."""
        here, on = self._sets.mask(term), self._sets.mask(out)
        if here[on].all():
            return x
        from_ = np.where(here, places(self._sets, term), here.sum())[on]
        padded = _padded(graph, x, rank)
        return graph.call_function(torch.index_select, (padded, 1, self._index(graph, from_)))

    def _index(self, graph: fx.Graph, values: Ids) -> fx.Node:
        key = values.tobytes()
        if key not in self._buffers:
            self._buffers[key] = f"channel_index_{len(self._buffers)}"
            values_here = torch.from_numpy(values).to(self._device)
            self._layers.register_buffer(self._buffers[key], values_here)
        return graph.get_attr(self._buffers[key])

    def _works_on_nothing(self, layer: str) -> bool:
        axes = self._axes.get(layer)
        return (
            axes is not None and axes.kind != "mixing" and not self._sets.mask(axes.out.ids).any()
        )


def _padded(graph: fx.Graph, x: fx.Node, rank: int) -> fx.Node:
    return graph.call_function(F.pad, (x, [0, 0] * (rank - 2) + [0, 1]))


def _work_on_zeros(graph: fx.Graph, node: fx.Node, rank: int) -> None:
    with graph.inserting_before(node):
        node.args = (_padded(graph, node.all_input_nodes[0], rank),)
    with graph.inserting_after(node):
        none = graph.call_function(torch.narrow, (node, 1, 0, 0))
    node.replace_all_uses_with(none, lambda user: user is not none)


def thin_module(layers: nn.Module, graphs: dict[bool, fx.Graph], name: str) -> nn.Module:
    """Return a module that runs the graphs: an fx.GraphModule where both are the same."""
    training = layers.training
    codes = {graph.python_code("self").src for graph in graphs.values()}
    thin = fx.GraphModule(layers, graphs[False], name) if len(codes) == 1 else None
    return (thin or ThinModule(layers, graphs)).train(training)


class ThinModule(nn.Module):
    """Plain layers and two graphs, as the network trains and as it evaluates."""

    def __init__(self, layers: nn.Module, graphs: dict[bool, fx.Graph]) -> None:
        super().__init__()
        self._modules, self._buffers = layers._modules, layers._buffers
        self._parameters = layers._parameters
        self._non_persistent_buffers_set = layers._non_persistent_buffers_set
        self._forwards = {mode: compiled(layers, graph) for mode, graph in graphs.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        return self._forwards[self.training](self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ThinModule:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = value if key == "_forwards" else copy.deepcopy(value, memo)
        return new

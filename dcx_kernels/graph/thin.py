"""Thin networks whose compact tensors meet or part: torch.fx graphs of plain torch operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from dcx_kernels.graph.edit import compiled, edited, flatten
from dcx_kernels.graph.joints import places
from dcx_kernels.graph.layout import Ids
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.walk import Consume, Flatten, Join, Select, Step

__all__ = ["ThinModule", "thin_graphs", "thin_module"]


def thin_graphs(model: ChannelModel, layers: nn.Module) -> dict[bool, fx.Graph]:
    """Return the graphs of the current selection; index lists become buffers of ``layers``.

    A sum over the union of channels pads each term with one channel of zeros and selects from it:
    exporters understand that better than index_add. A layer whose channels are all gone works on
    one channel of zeros, because torch's refuse to work on none.
    """
    sets = model.layer_sets
    device = next(model.parameters()).device
    known: dict[bytes, str] = {}

    def index(graph: fx.Graph, values: Ids) -> fx.Node:
        key = values.tobytes()
        if key not in known:
            known[key] = f"channel_index_{len(known)}"
            layers.register_buffer(known[key], torch.from_numpy(values).to(device))
        return graph.get_attr(known[key])

    def padded(graph: fx.Graph, x: fx.Node, rank: int) -> fx.Node:
        return graph.call_function(F.pad, (x, [0, 0] * (rank - 2) + [0, 1]))

    def place(graph: fx.Graph, x: fx.Node, term: Ids, out: Ids, rank: int) -> fx.Node:
        here, on = sets.mask(term), sets.mask(out)
        if here[on].all():
            return x
        from_ = np.where(here, places(sets, term), here.sum())[on]
        pad = padded(graph, x, rank)
        return graph.call_function(torch.index_select, (pad, 1, index(graph, from_)))

    def edit_for(shapes: dict[str, tuple[int, ...]]) -> Callable[..., fx.Node | None]:
        def edit(
            graph: fx.Graph, node: fx.Node, step: Step, inputs: list[fx.Node]
        ) -> fx.Node | None:
            if isinstance(step, Flatten):
                return flatten(graph, node, step, inputs)
            if isinstance(step, Consume):
                if not sets.mask(step.layout.ids).any():
                    rank = len(shapes[node.name])
                    node.replace_input_with(inputs[0], padded(graph, inputs[0], rank))
                return None
            if isinstance(step, Join):
                rank = len(shapes[step.terms[0][0].name])
                terms = [
                    place(graph, x, layout.ids, step.out.ids, rank)
                    for x, (_, layout) in zip(inputs, step.terms, strict=True)
                ]
                return graph.call_function(torch.add, tuple(terms))
            return _select(graph, step, inputs[0])

        def _select(graph: fx.Graph, step: Select, x: fx.Node) -> fx.Node:
            source = places(sets, step.layout.ids)
            chosen = source[step.positions[sets.mask(step.out.ids)]]
            count = int(sets.mask(step.layout.ids).sum())
            if np.array_equal(chosen, np.arange(count)):
                return x
            if np.array_equal(chosen, np.arange(len(chosen)) + (chosen[:1].sum())):
                return graph.call_function(torch.narrow, (x, 1, int(chosen[:1].sum()), len(chosen)))
            return graph.call_function(torch.index_select, (x, 1, index(graph, chosen)))

        return edit

    def without_channels(graph: fx.Graph, shapes: dict[str, tuple[int, ...]]) -> fx.Graph:
        for node in list(graph.nodes):
            axes = model.structure.axes.get(str(node.target)) if node.op == "call_module" else None
            if axes and axes.kind != "mixing" and not sets.mask(axes.out.ids).any():
                with graph.inserting_before(node):
                    x = padded(graph, node.args[0], len(shapes[node.name]))
                node.args = (x,)
                with graph.inserting_after(node):
                    none = graph.call_function(torch.narrow, (node, 1, 0, 0))
                node.replace_all_uses_with(none, lambda user, none=none: user is not none)
        return graph

    return {
        mode: without_channels(edited(traced, edit_for(traced.shapes)), traced.shapes)
        for mode, traced in model.structure.programs.items()
    }


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

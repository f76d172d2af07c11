"""Layers with parameters: convolution, linear, batch norm, PReLU."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx, nn

from dcx_kernels.graph.layout import Layout
from dcx_kernels.graph.rules.elementwise import per_channel
from dcx_kernels.graph.walk import Consume, Rule, Value, Walk

__all__ = ["MODULES"]


def _conv(walk: Walk, node: fx.Node) -> Value:
    name, conv = str(node.target), walk.module(node)
    shape = walk.shape(node)
    if _computed(conv) or shape is None or len(shape) != 4:
        why = "is computed anew at each step" if _computed(conv) else "meets an unbatched image"
        walk.keep_inputs(node, f"the weight of {name} {why}")
        return None
    layout = walk.layout(node.args[0]) or walk.full(conv.in_channels)
    if conv.groups == conv.in_channels > 1:
        return _depthwise(walk, name, conv, layout)
    out = Layout(walk.table.group(name, conv.out_channels))
    if conv.groups > 1:
        reason = f"grouped convolution ({name})"
        for side in (layout, out):
            if walk.policy.grouped == "equal":
                walk.table.equal_runs(side.ids, conv.groups, reason)
            else:
                walk.keep(side, reason)
    walk.layer(name, "mixing", out, layout)
    walk.steps[node] = Consume(layout)
    return walk.layout_of(out)


def _depthwise(walk: Walk, name: str, conv: nn.Conv2d, layout: Layout) -> Value:
    """Each output channel reads one input channel and exists where that does."""
    out = Layout(np.repeat(layout.ids, conv.out_channels // conv.in_channels))
    walk.layer(name, "follower", out, layout)
    return out


def _linear(walk: Walk, node: fx.Node) -> Value:
    name, linear = str(node.target), walk.module(node)
    shape = walk.shape(node)
    if shape is None or len(shape) != 2 or _computed(linear):
        why = "over more than two dimensions" if not _computed(linear) else "of computed weights"
        walk.keep_inputs(node, f"linear layer {why} ({name})")
        return None
    layout = walk.layout(node.args[0]) or walk.full(linear.in_features)
    out = Layout(walk.table.group(name, linear.out_features))
    walk.layer(name, "mixing", out, layout)
    walk.steps[node] = Consume(layout)
    return walk.layout_of(out)


def _batch_norm(walk: Walk, node: fx.Node) -> Value:
    layout = walk.layout(node.args[0])
    if layout is not None:
        walk.layer(str(node.target), "norm", layout, layout)
    return layout


def _prelu(walk: Walk, node: fx.Node) -> Value:
    layout = walk.layout(node.args[0])
    if layout is None or walk.module(node).num_parameters == 1:
        return per_channel(walk, node)
    walk.layer(str(node.target), "follower", layout, layout)
    return layout


def _computed(layer: Any) -> bool:
    """Whether something makes the weight anew at each forward (weight norm, for one)."""
    return "weight" not in layer._parameters


MODULES: dict[type, Rule] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.PReLU: _prelu,
}

"""What each kind of node does to channels: one rule per kind, in tables a reader can extend.

A rule takes the `Walk` and a node and returns the `Layout` of its output, or None when the output
holds no channels of a group. A node without a rule keeps every group that reaches it full-width:
never a wrong result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dcx_kernels.graph.groups import GroupBuilder, Layout, Member
from dcx_kernels.graph.trace import Program

__all__ = ["FUNCTION_RULES", "METHOD_RULES", "MODULE_RULES", "Rule", "Walk"]


class Walk:
    """One pass over a traced graph: layouts of its values, groups found so far.

    Args:
        model: the module that was traced.
        program: one of its graphs.
        groups: shared between the passes over the training and the evaluation graph.
    """

    def __init__(self, model: nn.Module, program: Program, groups: GroupBuilder) -> None:
        self.modules = dict(model.named_modules())
        self.shapes = program.shapes
        self.groups = groups
        self._layouts: dict[fx.Node, Layout | None] = {}
        for node in program.graph.nodes:
            self._layouts[node] = self._visit(node)

    def layout(self, value: Any) -> Layout | None:
        """Return the layout of an argument."""
        found = self._layouts.get(value) if isinstance(value, fx.Node) else None
        return None if found is None else Layout(self.groups.find(found.group), found.inner)

    def module(self, node: fx.Node) -> Any:
        """Return the module a call_module node calls."""
        return self.modules[str(node.target)]

    def keep_inputs(self, node: fx.Node, reason: str) -> None:
        """Keep every group among the node's inputs full-width."""
        for source in node.all_input_nodes:
            layout = self.layout(source)
            if layout is not None:
                self.groups.keep(layout.group, reason)

    def _visit(self, node: fx.Node) -> Layout | None:
        if node.op == "output":
            self.keep_inputs(node, "output of the network")
            return None
        rule = self._rule(node)
        if rule is not None:
            return rule(self, node)
        if node.op in ("call_module", "call_function", "call_method"):
            self.keep_inputs(node, f"no rule for {self._describe(node)}")
        return None

    def _rule(self, node: fx.Node) -> Rule | None:
        if node.op == "call_module":
            return MODULE_RULES.get(type(self.module(node)))
        if node.op == "call_function":
            return FUNCTION_RULES.get(node.target)
        if node.op == "call_method":
            return METHOD_RULES.get(str(node.target))
        return None

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.module(node)).__name__} ({node.target})"
        return getattr(node.target, "__name__", str(node.target))


Rule = Callable[[Walk, fx.Node], "Layout | None"]


def _same(walk: Walk, node: fx.Node) -> Layout | None:
    """Work on each channel alone: activations, pooling, dropout."""
    return walk.layout(node.args[0] if node.args else node.kwargs.get("input"))


def _conv(walk: Walk, node: fx.Node) -> Layout | None:
    name, conv, layout = str(node.target), walk.module(node), walk.layout(node.args[0])
    if layout is not None:
        walk.groups.join(layout.group, Member(name, "consumer", layout.inner))
    out = walk.groups.produce(name, conv.out_channels)
    if conv.groups > 1:
        walk.keep_inputs(node, f"grouped convolution ({name})")
        walk.groups.keep(out.group, f"grouped convolution ({name})")
    return out


def _linear(walk: Walk, node: fx.Node) -> Layout | None:
    name, linear, layout = str(node.target), walk.module(node), walk.layout(node.args[0])
    if len(walk.shapes[node.name]) != 2:
        walk.keep_inputs(node, f"linear layer over more than two dimensions ({name})")
        return None
    if layout is not None:
        walk.groups.join(layout.group, Member(name, "consumer", layout.inner))
    out = walk.groups.produce(name, linear.out_features)
    walk.groups.keep(out.group, "fully connected: the papers select convolution channels only")
    return out


def _batch_norm(walk: Walk, node: fx.Node) -> Layout | None:
    layout = walk.layout(node.args[0])
    if layout is not None:
        walk.groups.join(layout.group, Member(str(node.target), "norm", layout.inner))
    return layout


def _flatten(walk: Walk, node: fx.Node) -> Layout | None:
    """Merge all dims behind the batch: each channel brings its pixels as features."""
    layout, source = walk.layout(node.args[0]), node.args[0]
    assert isinstance(source, fx.Node)
    before, after = walk.shapes.get(source.name), walk.shapes.get(node.name)
    if layout is None:
        return None
    if before is None or after is None or len(after) != 2 or after[0] != before[0]:
        walk.keep_inputs(node, f"{node.name} mixes channels with other dims")
        return None
    pixels = 1
    for size in before[2:]:
        pixels *= size
    return Layout(layout.group, layout.inner * pixels)


def _view(walk: Walk, node: fx.Node) -> Layout | None:
    """Accept view(batch, -1) only: a number in the graph would fix the width."""
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if len(sizes) == 2 and sizes[1] == -1:
        return _flatten(walk, node)
    walk.keep_inputs(node, f"{node.target} with a fixed number of features")
    return None


def _spatial_mean(walk: Walk, node: fx.Node) -> Layout | None:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(walk.shapes[source.name])
    dims = [dims] if isinstance(dims, int) else dims
    if isinstance(dims, (list, tuple)) and all(isinstance(d, int) and d % rank >= 2 for d in dims):
        return walk.layout(source)
    walk.keep_inputs(node, "mean over batch or channels")
    return None


def _no_tensor(walk: Walk, node: fx.Node) -> Layout | None:
    """Read a size or an attribute; what yields a tensor after all (x[:, 0], x.mT) is kept."""
    if node.name in walk.shapes:
        walk.keep_inputs(node, f"no rule for {node.name}, which yields a tensor")
    return None


MODULE_RULES: dict[type, Rule] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.Flatten: _flatten,
    **dict.fromkeys(
        [
            nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
            nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
            nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d,
            nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample,
        ],
        _same,
    ),
}  # fmt: skip

FUNCTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        [
            F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish,
            F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.dropout, F.dropout2d,
            F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
            torch.relu, torch.relu_, torch.sigmoid, torch.tanh,
        ],
        _same,
    ),
    torch.flatten: _flatten,
    torch.mean: _spatial_mean,
    getattr: _no_tensor,
    operator.getitem: _no_tensor,
}  # fmt: skip

METHOD_RULES: dict[str, Rule] = {
    **dict.fromkeys(["relu", "relu_", "sigmoid", "tanh", "contiguous", "clone"], _same),
    "flatten": _flatten,
    "mean": _spatial_mean,
    "view": _view,
    "reshape": _view,
    "size": _no_tensor,
    "dim": _no_tensor,
}

"""What each kind of node does to channels: one rule per kind, in tables a reader can extend.

A rule takes the `Walk` and a node and returns the `Layout` of the node's value, or None when it
holds no channels of a group. It ties, joins or keeps groups on the way, and leaves a step where
something is to be done at run time. A node without a rule keeps every group that reaches it
full-width: never a wrong result.

To teach the graph a new module or function, put its rule into ``MODULE_RULES`` or
``FUNCTION_RULES``, under the class or function itself or its qualified name: ``per_channel`` is the
rule of everything that works on each channel alone.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dcx_kernels.graph.rules import elementwise, joins, layers, reshape
from dcx_kernels.graph.rules.elementwise import per_channel
from dcx_kernels.graph.walk import Rule, Walk

__all__ = ["FUNCTION_RULES", "METHOD_RULES", "MODULE_RULES", "per_channel", "rule_of"]

MODULE_RULES: dict[Any, Rule] = {
    **layers.MODULES,
    **elementwise.MODULES,
    **reshape.MODULES,
    "timm.layers.pool2d_same.AvgPool2dSame": per_channel,
    "timm.layers.pool2d_same.MaxPool2dSame": per_channel,
}
FUNCTION_RULES: dict[Any, Rule] = {
    "torchvision.ops.stochastic_depth.stochastic_depth": per_channel,
    **elementwise.FUNCTIONS,
    **joins.FUNCTIONS,
    **reshape.FUNCTIONS,
}
METHOD_RULES: dict[str, Rule] = {**elementwise.METHODS, **joins.METHODS, **reshape.METHODS}


def rule_of(walk: Walk, node: fx.Node) -> Rule | None:
    """Return the rule of a node, by the exact type of its module, its function or method."""
    if node.op == "call_method":
        return METHOD_RULES.get(str(node.target))
    rules: dict[Any, Rule] = MODULE_RULES if node.op == "call_module" else FUNCTION_RULES
    of: Any = type(walk.module(node)) if node.op == "call_module" else node.target
    name = f"{getattr(of, '__module__', '')}.{getattr(of, '__qualname__', '')}"
    return rules.get(of) or rules.get(name)

"""Where branches meet: sums, products, concatenations."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from dcx_kernels.graph.layout import Layout
from dcx_kernels.graph.rules.elementwise import per_channel
from dcx_kernels.graph.walk import Count, Join, Rule, Value, Walk

__all__ = ["FUNCTIONS", "METHODS"]


def _operands(walk: Walk, node: fx.Node) -> tuple[list[tuple[fx.Node, Layout]], bool]:
    """Return the operands that have channels, and whether nothing else is odd.

    A number, or a tensor with one channel for all (stochastic depth), works on each channel alone;
    a tensor with channels of its own that no group holds counts as always full.
    """
    operands: list[tuple[fx.Node, Layout]] = []
    result = walk.shape(node) or ()
    regular = len(node.args) == 2 and not node.kwargs and len(result) > 1
    for argument in node.args if regular else ():
        assert isinstance(argument, fx.Node) or walk.shape(argument) is None
        shape, layout = walk.shape(argument), walk.layout(argument)
        if layout is None and walk.value(argument) is not None:
            regular = False  # sizes, channels over several dims
        elif shape is not None and isinstance(argument, fx.Node):
            at = len(shape) - len(result) + 1  # its dim that meets the channels
            if at >= 0 and shape[at] == result[1]:
                operands.append((argument, layout or walk.full(result[1])))
                regular = regular and (layout is None or at == 1)
            elif layout is not None:
                walk.keep(layout, f"one channel for all in {walk.describe(node)}")
    return operands, regular


def _add(walk: Walk, node: fx.Node) -> Value:
    """Add: the residual policy decides."""
    operands, regular = _operands(walk, node)
    if not regular:
        return walk.unusual(node)
    layouts = [layout for _, layout in operands]
    if len(operands) < 2 or np.array_equal(layouts[0].ids, layouts[1].ids):
        return layouts[0] if layouts else None
    if len({layout.inner for layout in layouts}) > 1 or walk.policy.residual == "keep":
        walk.keep_inputs(node, "residual add (residual='keep')")
        return layouts[0]
    pixels = {(walk.shape(x) or ())[2:] for x, _ in operands}
    if len(pixels) > 1 and walk.policy.residual == "union":
        walk.keep_inputs(node, "added to channels of other pixels (residual='union')")
        return layouts[0]
    if _in_place(node) and len(operands[0][0].users) > 1:
        walk.keep_inputs(node, "changed in place and read again")
        return layouts[0]
    if walk.policy.residual == "tie":
        return walk.tie(layouts[0], layouts[1], "added to channels that it cannot be tied to")
    out = Layout(walk.table.union([layout.ids for layout in layouts]), layouts[0].inner)
    walk.steps[node] = Join(tuple(operands), out)
    return out


def _multiply(walk: Walk, node: fx.Node) -> Value:
    """A gate for every channel (squeeze and excitation) exists where its channel does."""
    operands, regular = _operands(walk, node)
    if not regular:
        return walk.unusual(node)
    layouts = [layout for _, layout in operands]
    if len(layouts) < 2:
        return layouts[0] if layouts else None
    fixed = any(walk.layout(x) is None for x, _ in operands)
    other = "a tensor of fixed width" if fixed else "channels that it cannot be tied to"
    return walk.tie(layouts[0], layouts[1], f"multiplied by {other}")


def _with_number(walk: Walk, node: fx.Node) -> Value:
    """Subtract, divide, take a power: by numbers and per-sample factors only."""
    operands, regular = _operands(walk, node)
    if regular and len(operands) == 1 and walk.layout(operands[0][0]) is not None:
        return operands[0][1]
    return walk.unusual(node)


def _count(walk: Walk, node: fx.Node) -> Value:
    """Arithmetic on a channel count is a channel count still; all else is not understood."""
    counts = [value for value in map(walk.value, node.args) if value is not None]
    if len(counts) == 1 and isinstance(counts[0], Count):
        return counts[0]._replace(exact=False)
    return walk.unusual(node)


def _arithmetic(rule: Rule) -> Rule:
    """Let numbers made of channel counts pass by ``rule``."""

    def apply(walk: Walk, node: fx.Node) -> Value:
        if walk.shape(node) is None:
            return _count(walk, node)
        return rule(walk, node)

    return apply


def _in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _expand_as(walk: Walk, node: fx.Node) -> Value:
    """A gate that is spread over the pixels of what it will multiply."""
    x, like = (walk.layout(argument) for argument in (*node.args, None)[:2])
    if x is None or like is None or len(x) != len(like):
        return walk.unusual(node)
    return walk.tie(x, like, "expanded to channels that it cannot be tied to")


def _cat(walk: Walk, node: fx.Node) -> Value:
    """Concatenate: along channels the lists are joined; along other dims they must be one."""
    parts = node.kwargs.get("tensors", node.args[0] if node.args else None)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    shapes = [walk.shape(part) for part in parts] if isinstance(parts, (list, tuple)) else []
    layouts: list[Layout] = []
    for part, shape in zip(parts, shapes, strict=True) if shapes else ():  # type: ignore[arg-type]
        known = walk.layout(part)
        if shape is None or len(shape) < 2 or (known is None and walk.value(part) is not None):
            break
        layouts.append(known or walk.full(shape[1]))
    if not shapes or len(layouts) != len(shapes) or not isinstance(dim, int):
        walk.keep_inputs(node, "an unusual concatenation")
        return None
    assert shapes[0] is not None
    if dim % len(shapes[0]) == 1:
        if len({layout.inner for layout in layouts}) > 1:  # flattened maps of unlike sizes
            layouts = [Layout(np.repeat(part.ids, part.inner)) for part in layouts]
        return Layout(np.concatenate([part.ids for part in layouts]), layouts[0].inner)
    for part in layouts[1:]:
        layouts[0] = walk.tie(layouts[0], part, "concatenated with unlike channels")
    return layouts[0]


_ADD = [operator.add, operator.iadd, torch.add]
_MULTIPLY = [operator.mul, operator.imul, torch.mul]
_NUMBER = [
    operator.sub, operator.isub, torch.sub, operator.truediv, operator.itruediv, torch.div,
    operator.floordiv, operator.pow, torch.pow, operator.mod,
]  # fmt: skip

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(_ADD, _arithmetic(_add)),
    **dict.fromkeys(_MULTIPLY, _arithmetic(_multiply)),
    **dict.fromkeys(_NUMBER, _arithmetic(_with_number)),
    torch.square: per_channel,
    operator.neg: per_channel,
    torch.cat: _cat,
    torch.concat: _cat,
}
METHODS: dict[str, Rule] = {
    **dict.fromkeys(["add", "add_"], _add),
    **dict.fromkeys(["mul", "mul_"], _multiply),
    **dict.fromkeys(["sub", "sub_", "div", "div_", "pow"], _with_number),
    "expand_as": _expand_as,
}

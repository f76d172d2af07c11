"""One pass over a traced graph: what every value's channels are, and what must be done for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import fx, nn

from dcx_kernels.graph.layout import ALWAYS, ChannelTable, Ids, Layout
from dcx_kernels.graph.trace import Program

__all__ = [
    "Axes", "Consume", "Count", "Flatten", "Fold", "Grouped", "Join", "Policy", "Residual", "Rule",
    "Select", "Sizes", "Step", "Walk",
]  # fmt: skip

Residual = Literal["keep", "tie", "union"]
Grouped = Literal["keep", "equal"]


class Policy(NamedTuple):
    """What `convert` was asked to do where channels meet."""

    residual: Residual
    grouped: Grouped


# --- what a value may be, besides a Layout --------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fold:
    """Channels over several dims, between a view and the view back; positions in ``source``."""

    source: fx.Node
    layout: Layout
    positions: Ids  # (d1, ..., dm), m >= 2


class Sizes(NamedTuple):
    """The sizes of a tensor."""

    layout: Layout


class Count(NamedTuple):
    """The channel count of a tensor, or (not ``exact``) a number made of it."""

    layout: Layout
    exact: bool = True


Value: TypeAlias = "Layout | Fold | Sizes | Count | tuple[Layout | None, ...] | None"


# --- what must be done at a node, once sets are known ---------------------------------------------


class Consume(NamedTuple):
    """A conv or linear reads ``layout``: the masked network multiplies by 0/1 here."""

    layout: Layout


class Join(NamedTuple):
    """A sum over the union of its terms' channels."""

    terms: tuple[tuple[fx.Node, Layout], ...]
    out: Layout


class Select(NamedTuple):
    """Channel p of ``out`` is channel ``positions[p]`` of ``source``, or zero where that is -1."""

    source: fx.Node
    layout: Layout
    positions: Ids
    out: Layout


class Flatten(NamedTuple):
    """Merge all dims behind the batch, or (``apart``) those behind the channels.

    Whatever width the network's author wrote down is of no account.
    """

    source: fx.Node
    layout: Layout
    apart: bool = False


Step: TypeAlias = "Consume | Join | Select | Flatten"


@dataclass
class Axes:
    """The channel axes of one layer."""

    kind: Literal["mixing", "norm", "follower"]
    out: Layout
    in_: Layout


class Walk:
    """Gives every node the channels of its value, by the rules; collects steps and axes.

    Args:
        modules: the traced model's modules by name.
        program: one of its graphs.
        table: channels of both graphs and of all passes.
        axes: layers of both graphs, of this pass.
        policy: residual and grouped.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        program: Program,
        table: ChannelTable,
        axes: dict[str, Axes],
        policy: Policy,
        rule_of: Callable[[Walk, fx.Node], Rule | None],
    ) -> None:
        self.modules = modules
        self.shapes = program.shapes
        self.table = table
        self.axes = axes
        self.policy = policy
        self.steps: dict[fx.Node, Step] = {}
        self._values: dict[fx.Node, Value] = {}
        for node in program.graph.nodes:
            self._values[node] = self._visit(node, rule_of)

    # --- what rules ask ---------------------------------------------------------------------------

    def value(self, argument: Any) -> Value:
        """Return what is known of an argument; None for numbers and tensors without channels."""
        return self._values.get(argument) if isinstance(argument, fx.Node) else None

    def layout(self, argument: Any) -> Layout | None:
        """Return the layout of an argument, as it stands after all ties."""
        found = self.value(argument)
        return self.layout_of(found) if isinstance(found, Layout) else None

    def layout_of(self, layout: Layout) -> Layout:
        """Return a layout as it stands after all ties."""
        return Layout(self.table.resolve(layout.ids), layout.inner)

    def full(self, count: int) -> Layout:
        """Return the layout of a tensor whose channels always exist."""
        return Layout(np.full(count, ALWAYS))

    def shape(self, argument: Any) -> tuple[int, ...] | None:
        """Return the dense shape of an argument; None for what is not a tensor."""
        return self.shapes.get(argument.name) if isinstance(argument, fx.Node) else None

    def module(self, node: fx.Node) -> Any:
        """Return the module a call_module node calls."""
        return self.modules[str(node.target)]

    # --- what rules say ---------------------------------------------------------------------------

    def keep(self, layout: Layout, reason: str) -> None:
        """Keep every group of a layout full-width."""
        self.table.keep(layout.ids, reason)

    def keep_inputs(self, node: fx.Node, reason: str) -> None:
        """Keep every group that reaches ``node`` full-width."""
        for source in node.all_input_nodes:
            for layout in _layouts(self.value(source)):
                self.keep(layout, reason)

    def unusual(self, node: fx.Node) -> Value:
        """Keep what reaches a node in a form that its rule does not know."""
        self.keep_inputs(node, f"channels reach {self.describe(node)} in an unusual way")
        return None

    def tie(self, a: Layout, b: Layout, reason: str) -> Layout:
        """Make the channels of two layouts one; keep both full-width where that is impossible."""
        if a.inner != b.inner or not self.table.tie(a.ids, b.ids):
            self.keep(a, reason)
            self.keep(b, reason)
        return self.layout_of(a)

    def layer(self, name: str, kind: Literal["mixing", "norm", "follower"], *sides: Layout) -> None:
        """Note the axes (out, in) of a layer; a shared one makes those of all its calls one."""
        known = self.axes.setdefault(name, Axes(kind, *sides))
        reason = f"{name} is shared by channels that cannot be one"
        known.out = self.tie(known.out, sides[0], reason)
        known.in_ = self.tie(known.in_, sides[1], reason)

    # --- the pass ---------------------------------------------------------------------------------

    def _visit(self, node: fx.Node, rule_of: Callable[[Walk, fx.Node], Rule | None]) -> Value:
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            self.keep_inputs(node, "output of the network")
            return None
        rule = rule_of(self, node)
        if rule is not None and (node.args or node.target in (torch.cat, torch.concat)):
            return rule(self, node)
        self.keep_inputs(node, f"no rule for {self.describe(node)}")
        return None

    def describe(self, node: fx.Node) -> str:
        """Return what a node calls, for people."""
        if node.op == "call_module":
            return f"{type(self.module(node)).__name__} ({node.target})"
        return getattr(node.target, "__name__", str(node.target))


def _layouts(value: Value) -> list[Layout]:
    if value is None:
        return []
    if isinstance(value, Layout):
        return [value]
    if isinstance(value, (Fold, Sizes, Count)):
        return [value.layout]
    return [layout for layout in value if layout is not None]


Rule = Callable[[Walk, fx.Node], Value]

"""The graph of a gated network: winners are handed on, until something needs all channels."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dcx_kernels.graph.fbs_find import RELUS, Unit, operation
from dcx_kernels.nn.gated_conv_channels import SampleChannels, union_add

__all__ = ["gated_graph"]

# each channel alone, and zeros stay zeros: these may work on the winners
_ZERO_STAYS: frozenset[Any] = RELUS | {
    nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Hardswish, nn.Identity,
    nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, F.leaky_relu, F.silu, F.gelu, F.hardswish, F.dropout, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, torch.tanh, torch._C._nn.avg_pool2d, torch._C._nn.gelu, "clone",
    "contiguous",
}  # fmt: skip
_FLATTENS: frozenset[Any] = frozenset([torch.flatten, "flatten", nn.Flatten])
_MEANS: frozenset[Any] = frozenset([torch.mean, "mean"])
_ADDS: frozenset[Any] = frozenset([operator.add, operator.iadd, torch.add, "add", "add_"])


def gated_graph(
    modules: Mapping[str, nn.Module], traced: fx.Graph, units: Mapping[str, Unit]
) -> tuple[fx.Graph, set[str]]:
    """Return a copy of a traced graph in which gated layers stand for units, and hand winners on.

    And the layers whose zeros reach something that makes other values of them: none of their
    channels can be cut for good.

    Args:
        modules: the dense network's.
        traced: one of its graphs.
        units: convolutions that are gated.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in units:
            for _ in range(1 + units[node.target].relu):  # the norm, then the ReLU
                (reader,) = node.users
                reader.replace_all_uses_with(node)
                graph.erase_node(reader)
    winners = _Winners(modules, graph, units)
    winners.hand_on()
    graph.lint()
    return graph, winners.fixed


class _Winners:
    """One pass over a graph, in its order."""

    def __init__(
        self, modules: Mapping[str, nn.Module], graph: fx.Graph, units: Mapping[str, Unit]
    ) -> None:
        self.modules, self.graph, self.units = modules, graph, units
        self.compact: set[fx.Node] = set()
        self.dense: dict[fx.Node, fx.Node] = {}
        self.fixed: set[str] = set()

    def hand_on(self) -> None:
        """Give every node the channels it can work with."""
        for node in list(self.graph.nodes):
            winners = [x for x in node.all_input_nodes if x in self.compact]
            if node.op == "call_module" and node.target in self.units:
                self.compact.add(node)
            elif winners:
                self._meet(node, winners)

    def _meet(self, node: fx.Node, winners: list[fx.Node]) -> None:
        what, alone = operation(self.modules, node), len(node.all_input_nodes) == 1
        if what in _ADDS and len(winners) == len(node.args) == 2 and not node.kwargs:
            self._replace(node, union_add, node.args)
        elif alone and what is F.pad and _pads_channels(node):
            self._replace(node, _pad_channels, node.args[:2])
        elif alone and node.args[0] is winners[0] and self._works_on_winners(node, what):
            self._on_values(node, winners[0], relu=what in RELUS)
        else:
            zero_stays = self._zero_stays(node)
            for x in winners:
                if not zero_stays:
                    self.fixed.update(self._producers(x))
                node.replace_input_with(x, self._dense(x))

    def _works_on_winners(self, node: fx.Node, what: Any) -> bool:
        if what in _MEANS:
            dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            return isinstance(dims, (list, tuple)) and set(dims) <= {2, 3, -1, -2}
        if what is operator.getitem:
            at = node.args[1]
            return isinstance(at, tuple) and len(at) == 4 and at[:2] == (slice(None), slice(None))
        if what is F.pad:
            return len(_pad(node)) <= 4 and _with_zeros(node)
        if what is nn.MaxPool2d:
            return not self.modules[str(node.target)].return_indices
        return what in _ZERO_STAYS and "return_indices" not in node.kwargs

    def _zero_stays(self, node: fx.Node) -> bool:
        """Whether a channel of zeros could as well be missing from what ``node`` reads."""
        what = operation(self.modules, node)
        if what in (nn.Linear, nn.Conv2d):
            return True
        if what not in _ZERO_STAYS and what not in _FLATTENS:
            return False
        return all(self._zero_stays(reader) for reader in node.users)

    def _producers(self, x: fx.Node) -> Iterator[str]:
        """Yield the gated layers whose channels x holds."""
        if x.op == "call_module" and x.target in self.units:
            yield str(x.target)
        else:
            for source in x.all_input_nodes:
                yield from self._producers(source)

    def _replace(self, node: fx.Node, function: Any, args: Any) -> None:
        with self.graph.inserting_before(node):
            new = self.graph.call_function(function, tuple(args))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.compact.add(new)

    def _on_values(self, node: fx.Node, x: fx.Node, relu: bool) -> None:
        """Let ``node`` work on the values of x, and put the channels to its result."""
        with self.graph.inserting_before(node):
            values = self.graph.call_function(getattr, (x, "values"))
        node.replace_input_with(x, values)
        with self.graph.inserting_after(node):
            new = self.graph.call_method("with_values", (x, node, relu))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.compact.add(new)

    def _dense(self, x: fx.Node) -> fx.Node:
        if x not in self.dense:
            with self.graph.inserting_after(x):
                self.dense[x] = self.graph.call_method("dense", (x,))
        return self.dense[x]


def _pad(node: fx.Node) -> tuple[int, ...]:
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    return tuple(given)


def _with_zeros(node: fx.Node) -> bool:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return mode == "constant" and value in (None, 0)


def _pads_channels(node: fx.Node) -> bool:
    pad = _pad(node)
    return len(node.args) >= 2 and len(pad) == 6 and min(pad) >= 0 and _with_zeros(node)


def _pad_channels(x: SampleChannels, pad: tuple[int, ...]) -> SampleChannels:
    """Pad pixels and channels with zeros, as `F.pad` does."""
    values: Tensor = F.pad(x.values, pad[:4])
    return x.with_values(values).padded(pad[4], pad[5])

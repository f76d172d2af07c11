"""Functional forms of layers become module calls again.

A subclass of a torch layer with a forward of its own (timm's batch norm with activation, its linear
layers) is traced as ``F.batch_norm(x, <its buffers>, ...)``. Where such calls do what the torch
class does with the same parameters, the module becomes that class, the graphs call it, and one rule
serves both forms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["call_modules"]


def call_modules(model: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
    """Rewrite modules and graphs of ``model`` (a copy of the user's) in place.

    Args:
        model: the module that was traced.
        graphs: training mode -> graph. A module changes only if all its calls allow it.
    """
    calls: dict[str, list[fx.Node]] = {}
    refused = set()
    for training, graph in graphs.items():
        for node in graph.nodes:
            form = _FORMS.get(node.target) if node.op == "call_function" else None
            if form is None:
                continue
            given = dict(zip(form.names, node.args, strict=False)) | node.kwargs
            owner = _owner(given)
            layer = None if owner is None else model.get_submodule(owner)
            if owner is None or not isinstance(layer, form.kind):
                continue
            calls.setdefault(owner, []).append(node)
            if not form.agrees(layer, given, training):
                refused.add(owner)
    for name in (name for name in calls if name not in refused):
        layer = model.get_submodule(name)
        layer.__class__ = next(
            form.kind for form in _FORMS.values() if isinstance(layer, form.kind)
        )
        for node in calls[name]:
            x = node.args[0] if node.args else node.kwargs["input"]
            with node.graph.inserting_before(node):
                call = node.graph.call_module(name, (x,))
            node.replace_all_uses_with(call)
            node.graph.erase_node(node)
            _erase_counting(node.graph, f"{name}.num_batches_tracked")
            _erase_identities(node.graph, model, name)
    for graph in graphs.values():
        for node in reversed(list(graph.nodes)):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)


def _owner(given: dict[str, Any]) -> str | None:
    """Return the module whose tensors, each under its own name, the call is given."""
    found = set()
    for name, value in given.items():
        if name == "input" or not isinstance(value, fx.Node):
            continue
        path, _, attribute = str(value.target).rpartition(".")
        if value.op != "get_attr" or attribute != name or not path:
            return None
        found.add(path)
    return found.pop() if len(found) == 1 and "input" in given else None


def _same_norm(norm: Any, given: dict[str, Any], training: bool) -> bool:
    tracked = norm.track_running_stats or not training
    wanted = {
        "running_mean": norm.running_mean is not None and tracked,
        "running_var": norm.running_var is not None and tracked,
        "weight": norm.weight is not None,
        "bias": norm.bias is not None,
    }
    return (
        norm.momentum is not None
        and given.get("eps", 1e-5) == norm.eps
        and given.get("momentum", 0.1) == norm.momentum
        and given.get("training", False) == (training or norm.running_mean is None)
        and all((given.get(name) is not None) == has for name, has in wanted.items())
    )


def _same_linear(linear: Any, given: dict[str, Any], training: bool) -> bool:
    return (given.get("bias") is None) == (linear.bias is None)


def _same_conv(conv: Any, given: dict[str, Any], training: bool) -> bool:
    def pair(value: Any) -> Any:
        return (value, value) if isinstance(value, (int, str)) else tuple(value)

    geometry = {"stride": 1, "padding": 0, "dilation": 1}
    return (
        conv.padding_mode == "zeros"
        and (given.get("bias") is None) == (conv.bias is None)
        and given.get("groups", 1) == conv.groups
        and all(
            not isinstance(given.get(name, default), fx.Node)
            and pair(given.get(name, default)) == pair(getattr(conv, name))
            for name, default in geometry.items()
        )
    )


class _Form(NamedTuple):
    kind: type[nn.Module]
    names: list[str]
    agrees: Callable[[Any, dict[str, Any], bool], bool]


_CONV = _Form(
    nn.Conv2d, ["input", "weight", "bias", "stride", "padding", "dilation", "groups"], _same_conv
)
_FORMS: dict[Any, _Form] = {
    F.batch_norm: _Form(
        nn.BatchNorm2d, list(inspect.signature(F.batch_norm).parameters), _same_norm
    ),
    F.linear: _Form(nn.Linear, ["input", "weight", "bias"], _same_linear),
    F.conv2d: _CONV,
    torch.conv2d: _CONV,
}


def _erase_identities(graph: fx.Graph, model: nn.Module, owner: str) -> None:
    """What stands between a norm and its activation (timm's drop) often does nothing."""
    inside = [n for n in graph.nodes if n.op == "call_module" and n.target.startswith(f"{owner}.")]
    for node in inside:
        if type(model.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _erase_counting(graph: fx.Graph, counter: str) -> None:
    """A batch norm counts its batches itself."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target == counter:
            for user in list(node.users):
                if user.op == "call_method" and user.target == "add_" and not user.users:
                    graph.erase_node(user)

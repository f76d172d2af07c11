"""Which convolutions of a traced network can be gated: with their batch norm, and their ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["RELUS", "Unit", "find_units", "operation"]

RELUS: frozenset[Any] = frozenset(
    [nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"]
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unit(NamedTuple):
    """A convolution, the batch norm that alone reads it, and whether a ReLU alone reads that."""

    conv: str
    norm: str
    relu: bool


def find_units(
    root: nn.Module, graphs: Mapping[bool, fx.Graph]
) -> tuple[dict[str, Unit], dict[str, str]]:
    """Return the units by convolution, and why other convolutions stay as they are.

    Args:
        root: the modules the graphs call.
        graphs: as they were traced for training and for evaluation.
    """
    modules = dict(root.named_modules())
    units: dict[str, Unit] = {}
    kept: dict[str, str] = {}
    found = [_units_of(modules, graph) for graph in graphs.values()]
    for name, module in modules.items():
        if not isinstance(module, nn.Conv2d):
            continue
        here = [units_of[name] for units_of in found if name in units_of]
        reasons = [unit for unit in here if isinstance(unit, str)]
        if reasons:
            kept[name] = reasons[0]
        elif len(here) < len(found) or len(set(here)) > 1:
            kept[name] = "it trains otherwise than it evaluates, or does not run"
        else:
            assert isinstance(here[0], Unit)
            units[name] = here[0]
    return units, kept


def operation(modules: Mapping[str, nn.Module], node: fx.Node) -> Any:
    """Return what a node does: the type of its module, its function, or its method's name."""
    if node.op == "call_module":
        return type(modules[str(node.target)])
    return node.target if node.op in ("call_function", "call_method") else None


def _units_of(modules: Mapping[str, nn.Module], graph: fx.Graph) -> dict[str, Unit | str]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found: dict[str, Unit | str] = {}
    for name, nodes in calls.items():
        conv = modules[name]
        if isinstance(conv, nn.Conv2d):
            reason = "it is called more than once" if len(nodes) > 1 else _not_gateable(conv)
            found[name] = reason or _unit(modules, calls, nodes[0])
    return found


def _not_gateable(conv: nn.Conv2d) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__} may compute otherwise than a convolution"
    if conv.groups != 1:
        return "a grouped convolution"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its padding ({conv.padding_mode}, {conv.padding}) is not a number of zeros"
    if "weight" not in conv._parameters:
        return "its weight is computed anew at each step"
    return "it has hooks" if any(getattr(conv, kind) for kind in _HOOKS) else None


def _unit(
    modules: Mapping[str, nn.Module], calls: Mapping[str, list[fx.Node]], node: fx.Node
) -> Unit | str:
    norm = _only_reader(node)
    if norm is None or operation(modules, norm) is not nn.BatchNorm2d:
        return "no batch norm alone reads it"
    name = str(norm.target)
    if len(calls[name]) > 1:
        return f"its batch norm {name} is called more than once"
    layer: Any = modules[name]
    if layer.running_mean is None:
        return f"its batch norm {name} has no running statistics"
    if any(getattr(layer, kind) for kind in _HOOKS):
        return f"its batch norm {name} has hooks"
    reader = _only_reader(norm)
    relu = reader is not None and operation(modules, reader) in RELUS
    return Unit(str(node.target), name, relu)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None

"""Sparse execution: layers that compute active channels only, compact tensors between them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import fx, nn

from dcx_kernels.graph.execution import Groups, Sets, measured_at
from dcx_kernels.graph.groups import ChannelGroup, Member
from dcx_kernels.graph.trace import Program
from dcx_kernels.nn import SparseChannelBatchNorm2d, SparseChannelConv2d, SparseChannelLinear
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["SparseExecution"]


class SparseExecution:
    """Layers are replaced by `dcx_kernels.nn`; tensors between them are compact."""

    name = "sparse"

    def __init__(self) -> None:
        self._sides: dict[str, tuple[str | None, str | None]] = {}  # layer: (out, in) group

    def prepare(self, root: nn.Module, programs: dict[bool, Program], groups: Groups) -> None:
        """Put a sparse layer in the place of every member; a norm swallows the ReLU behind it."""
        for name, group in groups.items():
            for member in group.members:
                out, in_ = self._sides.get(member.module, (None, None))
                sides = (out, name) if member.role == "consumer" else (name, in_)
                self._sides[member.module] = sides
                layer = root.get_submodule(member.module)
                if not isinstance(layer, ChannelLayer):
                    _replace(root, member.module, _sparse(layer, member))
                elif isinstance(layer, SparseChannelLinear) and member.role == "consumer":
                    layer.inner = member.inner
        for program in programs.values():
            _fuse_relu(root, program.graph)

    def apply(self, model: nn.Module, groups: Groups, active: Sets) -> None:
        """Set input and output channels of every layer."""
        for name, (out, in_) in self._sides.items():
            layer = model.get_submodule(name)
            out_active = active.get(out) if out is not None else None
            if isinstance(layer, SparseChannelBatchNorm2d):
                layer.set_active(out_active)
            else:
                assert isinstance(layer, (SparseChannelConv2d, SparseChannelLinear))
                layer.set_active(out_active, active.get(in_) if in_ is not None else None)

    def measure(self, model: nn.Module, groups: Groups, reduction: Reduction | None) -> None:
        """Switch the probe of each selectable group's measuring layer."""
        for group in groups.values():
            if group.selectable:
                layer = model.get_submodule(measured_at(group).module)
                assert isinstance(layer, ChannelLayer)
                layer.saliency_reduction = reduction

    def meter(self, model: nn.Module, group: ChannelGroup) -> SaliencyMeter:
        """Return the meter of the measuring layer."""
        layer = model.get_submodule(measured_at(group).module)
        assert isinstance(layer, ChannelLayer)
        return layer.saliency_meter

    def slots(self, model: nn.Module) -> dict[str, ParameterSlot]:
        """Sparse layers have their own."""
        return {}

    def around_forward(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


def _sparse(layer: nn.Module, member: Member) -> ChannelLayer:
    new: ChannelLayer
    if isinstance(layer, nn.Conv2d):
        new = SparseChannelConv2d.from_dense(layer, compact_output=True)
    elif isinstance(layer, nn.BatchNorm2d):
        new = SparseChannelBatchNorm2d.from_dense(layer)
    else:
        assert isinstance(layer, nn.Linear)
        inner = member.inner if member.role == "consumer" else 1
        new = SparseChannelLinear.from_dense(layer, inner)
    new.layer_name = member.module
    return new


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


def _fuse_relu(root: nn.Module, graph: fx.Graph) -> None:
    """Let a batch norm apply the ReLU that is its only reader."""
    modules = dict(root.named_modules(remove_duplicate=False))
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.users) != 1 or calls[node.target] != 1:
            continue
        norm, reader = modules[node.target], next(iter(node.users))
        if isinstance(norm, SparseChannelBatchNorm2d) and _is_relu(reader, modules):
            norm.relu = True
            reader.replace_all_uses_with(node)
            graph.erase_node(reader)


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return node.op == "call_function" and node.target in (
        torch.relu,
        torch.relu_,
        nn.functional.relu,
    )

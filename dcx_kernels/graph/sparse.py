"""Sparse execution: layers that compute active channels only, compact tensors between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from dcx_kernels.graph.edit import add_helper, edited, flatten
from dcx_kernels.graph.execution import Sets
from dcx_kernels.graph.fuse import fuse_conv_norm, fuse_relu
from dcx_kernels.graph.joints import Joint, make_joint
from dcx_kernels.graph.pooling import pool_by_mean
from dcx_kernels.graph.sets import ActiveSets, upload
from dcx_kernels.graph.structure import Structure
from dcx_kernels.graph.walk import Axes, Consume, Flatten, Join, Step
from dcx_kernels.nn import SparseChannelBatchNorm2d, SparseChannelConv2d, SparseChannelLinear
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.nn._forward import Forward, Operands
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.nn.prelu import SparseChannelPReLU
from dcx_kernels.ops.slot import ParameterSlot, pack_leaves

__all__ = ["SparseExecution"]


class SparseExecution:
    """Layers are replaced by `dcx_kernels.nn`; tensors between them are compact."""

    name = "sparse"

    def prepare(
        self, root: nn.Module, structure: Structure, forward: Forward
    ) -> dict[bool, fx.Graph]:
        """Put sparse layers in the place of dense ones, joints where compact tensors meet."""
        self._structure = structure
        self._layers: dict[str, ChannelLayer] = {}  # looking them up by name takes milliseconds
        replaced: dict[nn.Module, ChannelLayer] = {}
        for name, axes in structure.axes.items():
            layer = root.get_submodule(name)
            replaced[layer] = self._layers[name] = _sparse(layer, name, axes, forward)
        _replace(root, replaced)
        made: dict[tuple[object, ...], str] = {}

        def edit(
            graph: fx.Graph, node: fx.Node, step: Step, inputs: list[fx.Node]
        ) -> fx.Node | None:
            if isinstance(step, Consume):
                return None
            if isinstance(step, Flatten):
                return flatten(graph, node, step, inputs)
            key = _key(step)  # both graphs of a network use one joint
            if key not in made:
                made[key] = add_helper(root, "joint", make_joint(step))
            return graph.call_module(made[key], tuple(inputs))

        graphs = {mode: edited(traced, edit) for mode, traced in structure.programs.items()}
        fuse_relu(root, graphs)
        fuse_conv_norm(root, graphs)
        pool_by_mean(root, graphs)
        self._joints: list[Joint] = [getattr(root, name) for name in made.values()]
        steps = [step for traced in structure.programs.values() for step in traced.steps.values()]
        joined = [step.out for step in steps if not isinstance(step, (Consume, Flatten))]
        self.sets = ActiveSets(structure, joined)
        return graphs

    def apply(self, model: nn.Module, active: Sets) -> None:
        """Set input and output channels of every layer, then the joints between them."""
        sets, layers = self.sets, self._layers
        sets.update(active)
        for name, axes in self._structure.axes.items():
            layers[name].take_sets(sets[axes.out], sets[axes.in_])
        if self._joints:
            lists = [joint.lists(sets) for joint in self._joints]
            device = next(iter(active.values())).indices.device
            moved = iter(upload([part for parts in lists for part in parts], device))
            for joint, parts in zip(self._joints, lists, strict=True):
                joint.take([next(moved) for _ in parts])

    def measure(self, model: nn.Module, reduction: Reduction | None) -> None:
        """Switch the probe of each measuring layer."""
        for name in self._structure.measuring:
            self._layers[name].saliency_reduction = reduction

    def meters(self, model: nn.Module) -> dict[str, SaliencyMeter]:
        """Return the meters of the measuring layers."""
        return {name: self._layers[name].saliency_meter for name in self._structure.measuring}

    def slots(self, model: nn.Module) -> dict[str, ParameterSlot]:
        """Sparse layers have their own."""
        return {}

    def operands(self, x: Tensor) -> dict[str, Operands]:
        """Make packed leaves and probes of all layers."""
        if torch.is_grad_enabled():
            layers = self._layers.values()
            pack_leaves(slot for layer in layers for slot in layer.slots().values())
        return {name: layer.make_operands(x) for name, layer in self._layers.items()}

    def around_forward(self, model: nn.Module) -> None:
        """Nothing to do."""


def _key(step: Step) -> tuple[object, ...]:
    if isinstance(step, Join):
        return ("join", *(layout.ids.tobytes() for _, layout in step.terms))
    assert not isinstance(step, (Consume, Flatten))
    return "select", step.layout.ids.tobytes(), step.positions.tobytes()


def _sparse(layer: nn.Module, name: str, axes: Axes, forward: Forward) -> ChannelLayer:
    new: ChannelLayer
    if isinstance(layer, nn.Conv2d):
        new = SparseChannelConv2d.from_dense(layer, compact_output=True)
    elif isinstance(layer, nn.BatchNorm2d):
        new = SparseChannelBatchNorm2d.from_dense(layer)
    elif isinstance(layer, nn.PReLU):
        new = SparseChannelPReLU.from_dense(layer)
    else:
        assert isinstance(layer, nn.Linear)
        new = SparseChannelLinear.from_dense(layer, axes.in_.inner)
    new.layer_name = name
    new.saliency_meter.forward = forward
    return new


def _replace(root: nn.Module, new: Mapping[nn.Module, ChannelLayer]) -> None:
    """Replace modules under all their names."""
    for parent in list(root.modules()):
        for child, module in parent._modules.items():
            if module is not None and module in new:
                parent._modules[child] = new[module]

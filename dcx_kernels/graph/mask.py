"""Masked execution: what the papers do, our oracle and baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph.edit import add_helper, edited
from dcx_kernels.graph.execution import Sets
from dcx_kernels.graph.layout import Layout
from dcx_kernels.graph.sets import ActiveSets
from dcx_kernels.graph.structure import Structure
from dcx_kernels.graph.walk import Axes, Consume, Join, Step
from dcx_kernels.nn._forward import Forward, Operands
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["ChannelFactor", "ChannelProbe", "MaskExecution"]


class ChannelFactor(nn.Module):
    """Multiply by 0/1 what a consumer is about to read.

    Shape:
        (N, C * inner, ...) -> the same.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.active: ChannelSet | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero the inactive channels of x."""
        if self.active is None or self.active.is_full:
            return x
        mask = self.active.to(x.device).mask().to(x.dtype)
        if self.layout.inner > 1:
            mask = mask.repeat_interleave(self.layout.inner)
        return x * mask.view(1, -1, *[1] * (x.dim() - 2))


class ChannelProbe(nn.Module):
    """Pass h on; a hook measures the sum over pixels of (dL/dh) h by its definition (DCE eq. 2)."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.active: ChannelSet | None = None
        self.reduction: Reduction | None = None
        self.meter = SaliencyMeter(forward)

    def forward(self, h: Tensor) -> Tensor:
        """Return h unchanged."""
        if self.reduction is not None and self.training and h.requires_grad:
            feature = h.detach().clone()  # what reads h may overwrite it
            pixels, active = feature.shape[2:].numel(), self.active
            assert self.meter.forward is not None
            number = self.meter.forward.number

            def measure(dh: Tensor) -> None:
                signed = (dh * feature).flatten(2).sum(2)
                if active is not None:
                    signed = signed[:, active.to(signed.device).indices]
                self.meter.add(signed, signed.shape[0], [pixels], number)

            h.register_hook(measure)
        return h


class MaskExecution:
    """Plain torch layers, 0/1 factors at the input of every consumer, saliency by its definition.

    Nothing here uses our operators: the masked network is the oracle of the sparse one.
    """

    name = "mask"

    def prepare(
        self, root: nn.Module, structure: Structure, forward: Forward
    ) -> dict[bool, fx.Graph]:
        """Insert factors where channels are mixed or summed, probes behind measuring layers."""
        self._structure = structure
        self._layers = {name: root.get_submodule(name) for name in structure.axes}
        self._factors: dict[tuple[bytes, int], ChannelFactor] = {}
        self._probes: dict[str, ChannelProbe] = {}
        self._slots: dict[str, ParameterSlot] = {}
        names: dict[tuple[bytes, int], str] = {}

        def factor(graph: fx.Graph, x: fx.Node, layout: Layout) -> fx.Node:
            key = layout.ids.tobytes(), layout.inner
            if key not in self._factors:
                self._factors[key] = ChannelFactor(layout)
                names[key] = add_helper(root, "factor", self._factors[key])
            return graph.call_module(names[key], (x,))

        def edit(
            graph: fx.Graph, node: fx.Node, step: Step, inputs: list[fx.Node]
        ) -> fx.Node | None:
            if isinstance(step, Consume):
                node.replace_input_with(inputs[0], factor(graph, inputs[0], step.layout))
            elif isinstance(step, Join):
                for x, (_, layout) in zip(inputs, step.terms, strict=True):
                    node.replace_input_with(x, factor(graph, x, layout))
            return None

        graphs = {mode: edited(traced, edit) for mode, traced in structure.programs.items()}
        for name in structure.measuring:
            probe = self._probes[name] = ChannelProbe(forward)
            helper = add_helper(root, "probe", probe)
            for graph in graphs.values():
                _insert_behind(graph, name, helper)
        self.sets = ActiveSets(structure, [f.layout for f in self._factors.values()])
        return graphs

    def apply(self, model: nn.Module, active: Sets) -> None:
        """Hand the sets to factors, probes, and to the slots that the optimizer reads."""
        self.sets.update(active)
        for factor in self._factors.values():
            factor.active = self.sets[factor.layout]
        for name, probe in self._probes.items():
            probe.active = self.sets[self._structure.axes[name].out]
        for name, axes in self._structure.axes.items():
            self._set_slots(self._layers[name], name, axes)

    def _set_slots(self, layer: nn.Module, name: str, axes: Axes) -> None:
        for parameter_name, parameter in layer.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}"
            slot = self._slots.get(full_name)
            if slot is None or slot.parameter is not parameter:
                groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
                inner = axes.in_.inner if isinstance(layer, nn.Linear) else 1
                slot = ParameterSlot(parameter, groups, inner, packable=False)
                self._slots[full_name] = slot
            mixes = parameter.dim() > 1
            slot.set_active(self.sets[axes.out], self.sets[axes.in_] if mixes else None)

    def measure(self, model: nn.Module, reduction: Reduction | None) -> None:
        """Switch all probes."""
        for probe in self._probes.values():
            probe.reduction = reduction

    def meters(self, model: nn.Module) -> dict[str, SaliencyMeter]:
        """Return the probes' meters."""
        return {name: probe.meter for name, probe in self._probes.items()}

    def slots(self, model: nn.Module) -> dict[str, ParameterSlot]:
        """Return the slots of every narrowed layer's parameters."""
        return self._slots

    def operands(self, x: Tensor) -> dict[str, Operands]:
        """Dense layers read their own parameters."""
        return {}

    @contextmanager
    def around_forward(self, model: nn.Module) -> Iterator[None]:
        """Let norms move copies of their statistics; keep what belongs to active channels."""
        kept: list[tuple[nn.Module, str, Tensor, ChannelSet]] = []
        for name, axes in self._structure.axes.items():
            active = self.sets[axes.out] if axes.kind == "norm" else None
            norm = self._layers[name]
            if not norm.training or active is None or active.is_full:
                continue
            for vector in ("running_mean", "running_var"):
                original = norm._buffers[vector]
                if original is not None:  # autograd holds what the norm saw: it must not change
                    norm._buffers[vector] = original.clone()
                    kept.append((norm, vector, original, active))
        try:
            yield
        finally:
            for norm, vector, original, active in kept:
                moved = norm._buffers[vector]
                assert moved is not None
                mask = active.to(original.device).mask()
                original.copy_(torch.where(mask, moved, original))
                norm._buffers[vector] = original


def _insert_behind(graph: fx.Graph, module: str, helper: str) -> None:
    """Let all readers of a module's output read the helper's."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == module:
            with graph.inserting_after(node):
                new = graph.call_module(helper, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)

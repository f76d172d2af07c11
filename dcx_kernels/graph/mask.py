"""Masked execution: what the papers do, our oracle and baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph.execution import Groups, Sets, measured_at
from dcx_kernels.graph.groups import ChannelGroup
from dcx_kernels.graph.trace import Program
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["ChannelFactor", "ChannelProbe", "MaskExecution"]


class ChannelFactor(nn.Module):
    """Multiply by 0/1 what a consumer is about to read.

    Shape:
        (N, C * inner, ...) -> the same.
    """

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.active: ChannelSet | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero the inactive channels of x."""
        if self.active is None or self.active.is_full:
            return x
        mask = self.active.to(x.device).mask().to(x.dtype)
        if self.inner > 1:
            mask = mask.repeat_interleave(self.inner)
        return x * mask.view(1, -1, *[1] * (x.dim() - 2))


class ChannelProbe(nn.Module):
    """Pass h on; a hook measures the sum over pixels of (dL/dh) h by its definition (DCE eq. 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.active: ChannelSet | None = None
        self.reduction: Reduction | None = None
        self.meter = SaliencyMeter()

    def forward(self, h: Tensor) -> Tensor:
        """Return h unchanged."""
        if self.reduction is not None and self.training and h.requires_grad:
            feature = h.detach()  # an in-place ReLU behind it changes only what dL/dh zeroes
            pixels = feature.shape[2:].numel()

            def measure(dh: Tensor) -> None:
                self.meter.add_signed((dh * feature).flatten(2).sum(2), pixels)

            h.register_hook(measure)
        return h


class MaskExecution:
    """Plain torch layers, 0/1 factors at the input of every consumer, saliency by its definition.

    Nothing here uses our operators: the masked network is the oracle of the sparse one.
    """

    name = "mask"

    def __init__(self) -> None:
        self._factors: dict[str, list[ChannelFactor]] = {}
        self._probes: dict[str, ChannelProbe] = {}
        self._norms: dict[str, ChannelSet] = {}
        self._slots: dict[str, ParameterSlot] = {}

    def prepare(self, root: nn.Module, programs: dict[bool, Program], groups: Groups) -> None:
        """Insert a factor before every consumer and a probe behind every measuring layer."""
        selectable = {name: group for name, group in groups.items() if group.selectable}
        for name, group in selectable.items():
            self._factors[name] = []
            for member in group.of_role("consumer"):
                factor = ChannelFactor(member.inner)
                self._factors[name].append(factor)
                helper = _add_helper(root, "factor", factor)
                for program in programs.values():
                    _insert_before(program.graph, member.module, helper)
            probe = self._probes[measured_at(group).module] = ChannelProbe()
            helper = _add_helper(root, "probe", probe)
            for program in programs.values():
                _insert_behind(program.graph, measured_at(group).module, helper)

    def apply(self, model: nn.Module, groups: Groups, active: Sets) -> None:
        """Hand the sets to factors, and to the slots that the optimizer reads."""
        sets: dict[str, dict[str, ChannelSet]] = {}
        inner: dict[str, int] = {}
        for name, group in groups.items():
            for factor in self._factors.get(name, []):
                factor.active = active[name]
            for member in group.members:
                side = "in" if member.role == "consumer" else "out"
                if name in active:
                    sets.setdefault(member.module, {})[side] = active[name]
                if side == "in":
                    inner[member.module] = member.inner
                if member.role == "norm" and name in active:
                    self._norms[member.module] = active[name]
            if name in active and self._probes[measured_at(group).module].active != active[name]:
                probe = self._probes[measured_at(group).module]
                probe.active = active[name]
                probe.meter.reset()
        self._set_slots(model, sets, inner)

    def _set_slots(
        self, model: nn.Module, sets: Mapping[str, dict[str, ChannelSet]], inner: dict[str, int]
    ) -> None:
        for name, side in sets.items():
            layer = model.get_submodule(name)
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                full_name = f"{name}.{parameter_name}"
                slot = self._slots.get(full_name)
                if slot is None or slot.parameter is not parameter:
                    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
                    features = inner.get(name, 1) if isinstance(layer, nn.Linear) else 1
                    slot = ParameterSlot(parameter, groups, features, packable=False)
                    self._slots[full_name] = slot
                mixes = parameter.dim() > 1
                slot.set_active(side.get("out"), side.get("in") if mixes else None)

    def measure(self, model: nn.Module, groups: Groups, reduction: Reduction | None) -> None:
        """Switch all probes."""
        for probe in self._probes.values():
            probe.reduction = reduction

    def meter(self, model: nn.Module, group: ChannelGroup) -> SaliencyMeter:
        """Return the meter of a group's probe."""
        return self._probes[measured_at(group).module].meter

    def slots(self, model: nn.Module) -> dict[str, ParameterSlot]:
        """Return the slots of every member's parameters."""
        return self._slots

    @contextmanager
    def around_forward(self, model: nn.Module) -> Iterator[None]:
        """Let norms move copies of their statistics; keep what belongs to active channels."""
        kept: list[tuple[nn.Module, str, Tensor, ChannelSet]] = []
        for name, active in self._norms.items():
            norm = model.get_submodule(name)
            if not norm.training or active.is_full:
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


def _add_helper(root: nn.Module, kind: str, helper: nn.Module) -> str:
    """Give ``helper`` a place in ``root``; it adds nothing to the state_dict."""
    number = 0
    while hasattr(root, f"_dcx_{kind}_{number}"):
        number += 1
    root.add_module(f"_dcx_{kind}_{number}", helper)
    return f"_dcx_{kind}_{number}"


def _insert_before(graph: fx.Graph, module: str, helper: str) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == module:
            with graph.inserting_before(node):
                new = graph.call_module(helper, (node.args[0],))
            node.replace_input_with(node.args[0], new)


def _insert_behind(graph: fx.Graph, module: str, helper: str) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == module:
            with graph.inserting_after(node):
                new = graph.call_module(helper, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)

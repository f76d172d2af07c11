"""What every channel-sparse layer shares: its sets, its parameter slots, its saliency."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels._env import check_enabled
from dcx_kernels.channel_set import ChannelSet, agree
from dcx_kernels.errors import expected
from dcx_kernels.nn._forward import Operands, Probe
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["ChannelLayer"]


class ChannelLayer(nn.Module):
    """Mixin of `torch.nn` layers that compute active channels only.

    Sets, slots and the saliency meter are plain attributes, never buffers: the state_dict stays
    that of the dense layer, and torch.compile does not recompile when a set changes.
    """

    weight: Any
    bias: Any
    _parameter_axes: dict[str, str] = {}  # noqa: RUF012 - per class: "out", or "out,in"

    def _init_channels(self) -> None:
        self.layer_name = type(self).__name__  # in errors; `convert` puts the qualified name
        self.out_active: ChannelSet | None = None
        self.in_active: ChannelSet | None = None
        self.saliency_reduction: Reduction | None = None
        self.saliency_meter = SaliencyMeter()
        self._slots: dict[str, ParameterSlot] = {}

    def slots(self) -> dict[str, ParameterSlot]:
        """Return the slot of every parameter, made anew where a parameter was replaced."""
        for name in self._parameter_axes:
            parameter = getattr(self, name)
            slot = self._slots.get(name)
            if parameter is None:
                self._slots.pop(name, None)
            elif slot is None or slot.parameter is not parameter:
                slot = self._slots[name] = self._new_slot(name, parameter)
                self._set_slot(name, slot)
        return self._slots

    def _new_slot(self, name: str, parameter: nn.Parameter) -> ParameterSlot:
        return ParameterSlot(parameter)

    def _set_slot(self, name: str, slot: ParameterSlot) -> None:
        takes_in = self._parameter_axes[name] == "out,in"
        slot.set_active(self.out_active, self.in_active if takes_in else None)

    def take_sets(self, out: ChannelSet | None, in_: ChannelSet | None) -> None:
        """Choose the channels of the next forward; the caller knows that the sets fit.

        It forgets the saliency, too: that of other layers goes with it.
        """
        if out is self.out_active and in_ is self.in_active:
            return
        fields = self.__dict__  # past nn.Module's __setattr__, which costs more than all the rest
        fields["out_active"], fields["in_active"] = out, in_
        for name, slot in self._slots.items():
            slot.set_active(out, in_ if self._parameter_axes[name] == "out,in" else None)

    def _set_sets(self, out: ChannelSet | None, in_: ChannelSet | None) -> None:
        changed = out is not self.out_active
        self.out_active, self.in_active = out, in_
        for name, slot in self.slots().items():
            self._set_slot(name, slot)
        if changed:
            self.saliency_meter.reset()

    def operands(self, x: Tensor) -> Operands:
        """Return what a forward of x reads: made for it by the network around, or made now."""
        forward = self.saliency_meter.forward
        made = None if forward is None else forward.operands.get(self.layer_name)
        if made is None:
            return self.make_operands(x)
        zeros = None if made.probe is None else made.probe.tensor
        if zeros is not None and zeros.dim() == 2 and not agree(zeros.shape[0], x.shape[0]):
            made = made._replace(probe=self._make_probe(x))  # a view made another batch
        return made

    def make_operands(self, x: Tensor) -> Operands:
        """Make packed leaves, if a dcx optimizer asks for compact gradients, and a probe.

        Args:
            x: gives the batch size, and device and dtype to a layer without tensors.
        """
        if not torch.is_grad_enabled():
            return Operands()
        slots = self.slots()
        probe = None if self.saliency_reduction is None else self._make_probe(x)
        if not any(slot.compact for slot in slots.values()):
            return Operands(probe=probe)
        leaves = {name: slot.leaf() for name, slot in slots.items()}
        return Operands(True, leaves.get("weight"), leaves.get("bias"), probe)

    def _make_probe(self, x: Tensor) -> Probe | None:
        channels = self._measured_channels()
        if channels is None or not self.training:
            return None
        tensors = (self.weight, *self._buffers.values(), x)
        like = next(t for t in tensors if t is not None and t.is_floating_point())
        size = channels if self.out_active is None else len(self.out_active)
        assert self.saliency_reduction is not None
        return self.saliency_meter.probe(x.shape[0], size, like, self.saliency_reduction)

    def _measured_channels(self) -> int | None:
        """Return the number of channels, of layers that measure their saliency."""
        return None

    def _check_set(self, active: ChannelSet | None, size: int, which: str) -> None:
        if active is not None and not isinstance(active, ChannelSet):
            got = type(active).__name__
            raise TypeError(expected(f"a ChannelSet or None for {which}", got, self.layer_name))
        if active is not None and active.num_channels != size:
            what = f"{which} of {size} channels"
            raise ValueError(expected(what, active.num_channels, self.layer_name))

    # --- DCX_CHECK=1: a compact tensor knows its set ----------------------------------------------

    def _verify_tag(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        tag: ChannelSet | None = getattr(x, "_dcx_active", None)
        mine = self.in_active
        if tag is None or mine is None or not check_enabled():
            return
        if tag != mine and x.shape[1] == len(mine):
            raise ValueError(expected(f"x over {mine}", f"x over {tag}", self.layer_name))

    def _tag(self, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return y
        if check_enabled() and self.out_active is not None:
            y._dcx_active = self.out_active  # type: ignore[attr-defined]
        return y

"""What every channel-sparse layer shares: its sets, its parameter slots, its saliency."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels._env import check_enabled
from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["ChannelLayer"]


class ChannelLayer(nn.Module):
    """Mixin of `torch.nn` layers that compute active channels only.

    Sets, slots and the saliency meter are plain attributes, never buffers: the state_dict stays
        that of the dense
    layer, and torch.compile does not recompile when a set changes.
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

    def _set_sets(self, out: ChannelSet | None, in_: ChannelSet | None) -> None:
        changed = out is not self.out_active
        self.out_active, self.in_active = out, in_
        for name, slot in self.slots().items():
            self._set_slot(name, slot)
        if changed:
            self.saliency_meter.reset()

    def _operands(self) -> tuple[bool, Tensor | None, Tensor | None]:
        """Return whether this forward leaves compact gradients, and weight and bias for it.

        Under a dcx optimizer these are packed leaves, otherwise the full parameters.
        """
        slots = self.slots()
        if torch.is_grad_enabled() and any(slot.compact for slot in slots.values()):
            weight, bias = slots.get("weight"), slots.get("bias")
            leaves = [None if slot is None else slot.leaf() for slot in (weight, bias)]
            return True, leaves[0], leaves[1]
        return False, self.weight, self.bias

    def _check_set(self, active: ChannelSet | None, size: int, which: str) -> None:
        if active is not None and not isinstance(active, ChannelSet):
            got = type(active).__name__
            raise TypeError(expected(f"a ChannelSet or None for {which}", got, self.layer_name))
        if active is not None and active.num_channels != size:
            what = f"{which} of {size} channels"
            raise ValueError(expected(what, active.num_channels, self.layer_name))

    # --- DCX_CHECK=1: a compact tensor knows its set
    # ------------------------------------------------

    def _verify_tag(self, x: Tensor) -> None:
        tag: ChannelSet | None = getattr(x, "_dcx_active", None)
        mine = self.in_active
        if tag is None or mine is None or not check_enabled():
            return
        if tag != mine and x.shape[1] == len(mine):
            raise ValueError(expected(f"x over {mine}", f"x over {tag}", self.layer_name))

    def _tag(self, y: Tensor) -> Tensor:
        if check_enabled() and self.out_active is not None:
            y._dcx_active = self.out_active  # type: ignore[attr-defined]
        return y

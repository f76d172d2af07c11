"""What active-slice optimizers share: the walk over parameters, torch's own update on slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.ops.slot import CompactGrad, ParameterSlot, SliceRows, parameter_slots

__all__ = ["ActiveSliceOptimizer", "Inactive"]

Inactive = Literal["frozen", "decay"]


class ActiveSliceOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step touches active slices only.

    State tensors are full, keyed and laid out as torch's, so that state_dicts are interchangeable.
    A step gathers the slice of each state tensor, runs torch's own update on packed tensors, and
    writes the slices back. What the packed path cannot do - gradients over different sets since the
    last step, masked execution, ``inactive="decay"``
    - is done on full tensors, exactly and more slowly.

    Args:
        model: any module. Its channel-sparse layers leave compact gradients from now on.
        params: parameters or param groups of the model; None means all parameters.
        defaults: hyper-parameters.
        inactive: ``"frozen"``: weights and state outside the active slice are bitwise untouched;
            ``"decay"``: momentum and weight decay go on moving them, as in a masked PyTorch loop.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: on an unknown ``inactive``.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        inactive: Inactive,
    ) -> None:
        if not isinstance(model, nn.Module):
            what = "a module first (param groups go to params=)"
            raise TypeError(expected(what, type(model).__name__))
        if inactive not in ("frozen", "decay"):
            raise ValueError(expected("inactive to be 'frozen' or 'decay'", repr(inactive)))
        self.inactive = inactive
        self._model = model
        super().__init__(model.parameters() if params is None else params, defaults)
        self._scratch: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._adopt_slots()

    def _adopt_slots(self) -> dict[Tensor, ParameterSlot]:
        """Map parameters to slots, new ones included; ask their layers for compact gradients."""
        dense = getattr(self._model, "grads", "compact") == "dense"
        slots = {slot.parameter: slot for _, slot in parameter_slots(self._model)}
        for slot in slots.values():
            slot.compact = slot.packable and not dense
        return slots  # type: ignore[return-value]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = self._adopt_slots()
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step_parameter(group, parameter, slots.get(parameter))
        return loss

    def _step_parameter(
        self, group: dict[str, Any], parameter: Tensor, slot: ParameterSlot | None
    ) -> None:
        if slot is None:
            if parameter.grad is not None:
                self._update_full(group, parameter, parameter.grad, None)
            return
        gradient = slot.gradient()
        if gradient is None:
            return
        if slot.compact and gradient.mask is None and self.inactive == "frozen":
            self._update_slice(group, parameter, slot, gradient)
        elif self.inactive == "decay":
            self._update_full(group, parameter, self._as_dense(gradient, slot), None)
        else:
            self._update_full(group, parameter, gradient.tensor, gradient.mask)
        slot.consume()

    def _update_slice(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        slot: ParameterSlot,
        gradient: CompactGrad,
    ) -> None:
        leaf = slot.consumable()
        if leaf is not None:
            packed, rows = leaf
        else:  # the parameter was modified after its forward
            rows = slot.rows(gradient.out_active, gradient.in_active, current=False)
            packed = parameter if rows is None else rows.gather(parameter)
        if rows is None:
            self._update_full(group, parameter, gradient.tensor, None)
            return
        packed = packed.detach()
        state, fresh = self._state_of(parameter, group)
        slices = {
            name: rows.gather(tensor, self._scratch_for(name, rows, tensor))
            for name, tensor in self._tensors(state).items()
        }
        self._update(group, packed, gradient.tensor, slices, state, fresh)
        rows.scatter_(parameter, packed)
        for name, tensor in self._tensors(state).items():
            rows.scatter_(tensor, slices[name])

    def _update_full(
        self, group: dict[str, Any], parameter: Tensor, grad: Tensor, mask: Tensor | None
    ) -> None:
        state, fresh = self._state_of(parameter, group)
        tensors = self._tensors(state)
        if mask is None:
            self._update(group, parameter, grad, tensors, state, fresh)
            return
        stepped = parameter.clone()
        stepped_state = {name: tensor.clone() for name, tensor in tensors.items()}
        self._update(group, stepped, grad, stepped_state, state, fresh)
        parameter.copy_(torch.where(mask, stepped, parameter))
        for name, tensor in tensors.items():
            tensor.copy_(torch.where(mask, stepped_state[name], tensor))

    def _as_dense(self, gradient: CompactGrad, slot: ParameterSlot) -> Tensor:
        rows = slot.rows(gradient.out_active, gradient.in_active, current=False)
        if not slot.compact or gradient.mask is not None or rows is None:
            return gradient.tensor
        dense = torch.zeros_like(slot.parameter)
        rows.scatter_(dense, gradient.tensor)
        return dense

    def _scratch_for(self, name: str, rows: SliceRows, like: Tensor) -> Tensor:
        """Return persistent memory for one gathered state tensor: fresh pages cost page faults."""
        key = (name, like.device, like.dtype)
        needed = rows.rows.shape[0] * rows.row
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < needed:
            buffer = self._scratch[key] = like.new_empty(needed)
        return buffer

    def _tensors(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state tensors of the parameter's shape."""
        return {k: v for k, v in state.items() if k != "step" and isinstance(v, Tensor)}

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the state of a parameter, created if need be, and whether it was."""
        state: dict[str, Any] = self.state.get(parameter, {})
        fresh = self._create_state(state, parameter, group)
        if state:
            self.state[parameter] = state
        return state, fresh

    def _create_state(
        self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]
    ) -> bool:
        raise NotImplementedError

    def _update(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        grad: Tensor,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        fresh: bool,
    ) -> None:
        """Run torch's update in place on a parameter and its state tensors, packed or full."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, compact ones too."""
        super().zero_grad(set_to_none)
        for _, slot in parameter_slots(self._model):
            slot.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        return {"inactive": self.inactive, "_model": self._model, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_scratch", {})

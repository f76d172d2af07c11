"""What active-slice optimizers share: the walk over parameters, torch's own update on slices."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.ops.slot import CompactGrad, ParameterSlot, parameter_slots
from dcx_kernels.optim._task import Scratch, SliceTask

__all__ = ["ActiveSliceOptimizer", "Inactive"]

Inactive = Literal["frozen", "decay"]

_CHUNK = 1 << 20  # elements


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
        self._scratch = Scratch()
        self._adopt(self._slots())

    def _slots(self) -> dict[Tensor, ParameterSlot]:
        return {slot.parameter: slot for _, slot in parameter_slots(self._model)}

    def _adopt(self, slots: dict[Tensor, ParameterSlot]) -> None:
        """Ask the layers of all slots for compact gradients, and own those of our parameters."""
        dense = getattr(self._model, "grads", "compact") == "dense"
        for slot in slots.values():
            slot.compact = slot.packable and not dense
        me = weakref.ref(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in slots:
                    slots[parameter].owner = me

    def _owns(self, slot: ParameterSlot) -> bool:
        """Whether the slot's gradients are ours to drop: another optimizer's are not."""
        owner = slot.owner()
        return owner is self or owner is None

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
        slots = self._slots()
        for group in self.param_groups:
            for chunk in self._chunks(group, slots):
                for fresh in (True, False):
                    tasks = [task for task in chunk if task.fresh is fresh]
                    if tasks:
                        self._update(group, tasks, fresh)
                for task in chunk:
                    task.write_back()
        for slot in slots.values():
            if self._owns(slot):
                slot.consume()
        self._adopt(slots)  # not before: gradients are where they were asked for
        return loss

    def _chunks(
        self, group: dict[str, Any], slots: dict[Tensor, ParameterSlot]
    ) -> Iterator[list[SliceTask]]:
        """Yield the updates of a group, `_CHUNK` elements at a time: they stay in cache."""
        chunk: list[SliceTask] = []
        elements = 0
        for parameter in group["params"]:
            task = self._task(group, parameter, slots.get(parameter))
            if task is None:
                continue
            if chunk and elements + task.packed.numel() > _CHUNK:
                yield chunk
                chunk, elements = [], 0
                self._scratch.release()
            task.gather(self._scratch)
            chunk.append(task)
            elements += task.packed.numel()
        yield chunk
        self._scratch.release()

    def _task(
        self, group: dict[str, Any], parameter: Tensor, slot: ParameterSlot | None
    ) -> SliceTask | None:
        """Decide how a parameter is updated: packed, in full, or in full where a mask is true."""
        gradient: CompactGrad | None
        if slot is not None:
            gradient = slot.gradient()
        else:
            gradient = None if parameter.grad is None else CompactGrad(parameter.grad, None, None)
        if gradient is None:
            return None
        state = self.state.get(parameter, {})
        fresh = self._create_state(state, parameter, group)
        if state:
            self.state[parameter] = state
        task = SliceTask(parameter, gradient.tensor, state, fresh)
        if slot is None:
            return task
        if gradient.mask is not None or not slot.compact:
            task.mask = None if self.inactive == "decay" else gradient.mask
            return task
        leaf = slot.consumable()
        if leaf is not None:
            rows = leaf.rows
        else:
            rows = slot.rows(gradient.out_active, gradient.in_active, current=False)
        if rows is None:
            return task
        if self.inactive == "decay":
            task.grad = torch.zeros_like(parameter)
            rows.scatter_(task.grad, gradient.tensor)
            return task
        task.rows = rows
        # without a leaf the parameter was modified after its forward: pack what it holds now
        task.packed = rows.gather(parameter) if leaf is None else leaf.tensor.detach()
        return task

    def _create_state(
        self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]
    ) -> bool:
        """Create the missing state of a parameter; return whether there was none."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], tasks: list[SliceTask], fresh: bool) -> None:
        """Run torch's update in place on the packed parameters and state tensors of ``tasks``."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, compact ones too."""
        super().zero_grad(set_to_none)
        for slot in self._slots().values():
            if self._owns(slot):
                slot.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        return {"inactive": self.inactive, "_model": self._model, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_scratch", Scratch())

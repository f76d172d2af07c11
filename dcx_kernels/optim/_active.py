"""What active-slice optimizers share: the walk over parameters, and what of each is updated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.kernels.slices import Scratch
from dcx_kernels.ops.slot import CompactGrad, ParameterSlot, slots_of
from dcx_kernels.optim._task import SliceTask

__all__ = ["ActiveSliceOptimizer", "Inactive"]

Inactive = Literal["frozen", "decay"]


class ActiveSliceOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step touches active slices only.

    State tensors are full, keyed and laid out as torch's, so that state_dicts are interchangeable.
    A step hands all parameters to the backend in one call, which updates them and their state at
    the slices. Gradients over different sets since the last step, masked execution and
    ``inactive="decay"`` are updates of full tensors, exact and slower.

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

    _shown: frozenset[Tensor] = frozenset()  # the packed leaves that ``param_groups`` shows
    _hides_leaves = False

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

    # --- param groups -----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups; each ``"params"`` ends with the packed leaves that hold gradients now.

        Backward fills these, while their parameters have no ``.grad``. torch code that walks over
        an optimizer's gradients, `torch.amp.GradScaler` above all, must meet every one of them.
        Between `step` (or `zero_grad`) and the next backward there are none.
        """
        groups = self._groups()
        if not self._hides_leaves:
            slots = self._slots()
            shown: list[Tensor] = []
            for group in groups:
                known = [slots[p] for p in group["params"] if p in slots]
                leaves = [leaf for slot in known for leaf in slot.pending()]
                group["params"] += leaves
                shown += leaves
            self._shown = frozenset(shown)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def _groups(self) -> list[dict[str, Any]]:
        """Return the param groups with nothing but parameters in them."""
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        if self._shown:
            for group in groups:
                group["params"][:] = [p for p in group["params"] if p not in self._shown]
            self._shown = frozenset()
        return groups

    @contextmanager
    def _parameters_only(self) -> Iterator[None]:
        """Keep leaves out of ``param_groups``, for torch's own handling of states."""
        self._hides_leaves = True
        self._groups()
        try:
            yield
        finally:
            self._hides_leaves = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the keys and shapes of torch's."""
        with self._parameters_only():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, torch's or ours."""
        with self._parameters_only():
            super().load_state_dict(state_dict)

    # --- whose gradients they are -----------------------------------------------------------------

    def _slots(self) -> dict[Tensor, ParameterSlot]:
        return {slot.parameter: slot for slot in slots_of(self._model)}

    def _adopt(self, slots: dict[Tensor, ParameterSlot]) -> None:
        """Ask the layers of all slots for compact gradients, and own those of our parameters."""
        dense: set[Tensor] = set()
        for module in self._model.modules():  # a converted model may be wrapped, or part of another
            if getattr(module, "grads", None) == "dense":
                dense.update(module.parameters())
        for slot in slots.values():
            slot.compact = slot.packable and slot.parameter not in dense
        me = weakref.ref(self)
        for group in self._groups():
            for parameter in group["params"]:
                if parameter in slots:
                    slots[parameter].owner = me

    def _owns(self, slot: ParameterSlot) -> bool:
        """Whether the slot's gradients are ours to drop: another optimizer's are not."""
        owner = slot.owner()
        return owner is self or owner is None

    # --- a step -----------------------------------------------------------------------------------

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
        for group in self._groups():
            found = (self._task(group, p, slots.get(p)) for p in group["params"])
            self._apply(group, [task for task in found if task is not None])
        for slot in slots.values():
            if self._owns(slot):
                slot.consume()
        self._adopt(slots)  # not before: gradients are where they were asked for
        return loss

    def _apply(self, group: dict[str, Any], tasks: list[SliceTask]) -> None:
        """Update the parameters of a group: in one call, but for those under a mask."""
        together: dict[torch.device, list[SliceTask]] = {}
        for task in tasks:
            task.lay_out()
            if task.mask is None:
                together.setdefault(task.parameter.device, []).append(task)
            else:
                copy = task.unmasked()
                self._update(backend.choose(task.parameter.device), group, [copy])
                task.take_masked(copy)
        for device, alike in together.items():
            self._update(backend.choose(device), group, alike)

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
            task.slice, task.leaf = leaf.slice, leaf.tensor.detach()
        else:  # the parameter was modified after its forward: what it holds now counts
            task.slice = slot.slice(gradient.out_active, gradient.in_active, current=False)
        if task.slice is not None and self.inactive == "decay":
            task.grad = torch.zeros_like(parameter)
            kernels = backend.choose(parameter.device)
            kernels.scatter_slices_([task.grad], [gradient.tensor], [task.slice])
            task.slice = None
        return task

    def _create_state(
        self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]
    ) -> bool:
        """Create the missing state of a parameter; return whether there was none."""
        raise NotImplementedError

    def _update(self, kernels: Any, group: dict[str, Any], tasks: list[SliceTask]) -> None:
        """Let ``kernels`` update the parameters and state tensors of ``tasks`` in place."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, compact ones too."""
        with self._parameters_only():
            super().zero_grad(set_to_none)
        for slot in self._slots().values():
            if self._owns(slot):
                slot.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        with self._parameters_only():
            return {"inactive": self.inactive, "_model": self._model, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_scratch", Scratch())

"""What active-slice optimizers share: the walk over parameters, torch's own update on slices."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.ops.slot import CompactGrad, ParameterSlot, slots_of
from dcx_kernels.optim._task import Scratch, SliceTask
from dcx_kernels.optim._vectors import VectorTasks, vectors_alike

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
            tasks = [task for task in found if task is not None]
            alike = vectors_alike(tasks)
            for vectors in alike:
                together = VectorTasks(vectors)
                together.gather()
                self._update(group, vectors, vectors[0].fresh)
                together.write_back()
            done = {id(task) for vectors in alike for task in vectors}
            for chunk in self._chunks([task for task in tasks if id(task) not in done]):
                for fresh in (True, False):
                    part = [task for task in chunk if task.fresh is fresh]
                    if part:
                        self._update(group, part, fresh)
                for task in chunk:
                    task.write_back()
        for slot in slots.values():
            if self._owns(slot):
                slot.consume()
        self._adopt(slots)  # not before: gradients are where they were asked for
        return loss

    def _chunks(self, tasks: list[SliceTask]) -> Iterator[list[SliceTask]]:
        """Yield updates `_CHUNK` elements at a time, gathered: they stay in cache."""
        chunk: list[SliceTask] = []
        elements = 0
        for task in tasks:
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

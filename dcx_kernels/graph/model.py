"""The converted model: the dense network's names and state_dict, only active channels between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, fx, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.graph.execution import Execution
from dcx_kernels.graph.groups import ChannelGroup
from dcx_kernels.graph.trace import Program
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import CompactGrad, parameter_slots

__all__ = ["ChannelModel"]


class ChannelModel(nn.Module):
    """A network made by `dcx_kernels.convert`.

    Its modules, parameters and buffers carry the dense network's names. `train` and `eval` switch
    between two traced graphs. Between layers, tensors are compact (``execution="sparse"``), or
    dense and multiplied by 0/1 at the input of every consumer (``execution="mask"``, the papers'
    baseline and our oracle).

    Attributes:
        groups: name -> `ChannelGroup`, in the order of the network.
        execution: ``"sparse"`` or ``"mask"``.
        grads: ``"compact"``: under a `dcx_kernels.optim` optimizer, gradients are packed and no
            dense gradient exists; ``"dense"``: ordinary ``.grad`` with zeros, for every other
            optimizer. Without a dcx optimizer gradients are dense anyway.
    """

    def __init__(
        self,
        root: nn.Module,
        skeleton: nn.Module,
        programs: dict[bool, Program],
        groups: dict[str, ChannelGroup],
        execution: Execution,
        example_shapes: list[tuple[int, ...]],
    ) -> None:
        super().__init__()
        self._modules, self._parameters = root._modules, root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        self.groups = groups
        self.grads: Literal["compact", "dense"] = "compact"
        self.example_shapes = example_shapes
        self.output_pixels = programs[False].output_pixels()
        self._plain = (skeleton,)  # in a tuple, so that nn.Module does not register it
        self._programs = programs
        self._execution = execution
        self._saliency_reduction: Reduction | None = None
        self._active = {
            name: ChannelSet.full(group.num_channels)
            for name, group in groups.items()
            if group.selectable
        }
        self._forwards = {mode: _compile(self, p.graph) for mode, p in programs.items()}
        execution.apply(self, groups, self._active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        with self._execution.around_forward(self):
            return self._forwards[self.training](self, *args, **kwargs)

    @property
    def execution(self) -> str:
        """``"sparse"`` or ``"mask"``."""
        return self._execution.name

    # --- which channels exist ---------------------------------------------------------------------

    @property
    def active(self) -> dict[str, ChannelSet]:
        """The active set of every selectable group."""
        return dict(self._active)

    def set_active(self, sets: Mapping[str, ChannelSet]) -> None:
        """Choose the channels of the next forward; groups not named keep theirs.

        Backward always uses the sets of its own forward.

        Raises:
            ValueError: on a group that does not exist or is kept full-width, or a set of another
                size; nothing is changed then.
            TypeError: on a value that is not a `ChannelSet`.
        """
        for name, new in sets.items():
            self._check(name, new)
        changed = False
        for name, new in sets.items():
            if new != self._active[name]:  # an equal set keeps the old object: identity means equal
                self._active[name] = new
                changed = True
        if changed:
            self._execution.apply(self, self.groups, self._active)

    def _check(self, name: str, new: object) -> None:
        group = self.groups.get(name)
        if group is None:
            raise ValueError(expected(f"a group among {list(self.groups)}", repr(name)))
        if not isinstance(new, ChannelSet):
            raise TypeError(expected("a ChannelSet", type(new).__name__, name))
        if new.num_channels != group.num_channels:
            what = f"a set over {group.num_channels} channels"
            raise ValueError(expected(what, new.num_channels, name))
        if not group.selectable and not new.is_full:
            what = f"all channels ({group.reason})"
            raise ValueError(expected(what, f"{len(new)} of {group.num_channels}", name))
        if not group.selectable:
            raise ValueError(expected("a selectable group", f"one kept full: {group.reason}", name))

    # --- saliency and gradients -------------------------------------------------------------------

    @property
    def saliency_reduction(self) -> Reduction | None:
        """What backward measures: ``"batch"``, ``"sample"`` (then both are readable), or None."""
        return self._saliency_reduction

    @saliency_reduction.setter
    def saliency_reduction(self, reduction: Reduction | None) -> None:
        if reduction not in ("batch", "sample", None):
            what = "saliency_reduction 'batch', 'sample' or None"
            raise ValueError(expected(what, repr(reduction)))
        self._saliency_reduction = reduction
        self._execution.measure(self, self.groups, reduction)

    def saliency(self, reduction: Reduction = "batch") -> dict[str, Tensor]:
        """Return the saliency of the active channels of every selectable group, in set order.

        It covers the backward passes since the sets last changed, `zero_grad`, or the previous
        forward after a
        reading: micro-batches add up.

        Args:
            reduction: ``"batch"``: |mean over batch and pixels of (dL/dh) h|;
                ``"sample"``: mean over the batch of |mean over pixels of (dL/dh) h|.

        Raises:
            ValueError: before the first backward, or if it was not measured (see
                ``saliency_reduction``).

        Shape:
            {group: (len(active),)}, float32 or float64.

        References:
            Molchanov et al., https://arxiv.org/abs/1611.06440; DCE eq. 2; DCP eq. 7.
        """
        if self._saliency_reduction is None:
            raise ValueError(expected("saliency_reduction 'batch' or 'sample'", "None"))
        result = {}
        for name, active in self._active.items():
            meter = self._meter(name)
            value = meter.read(reduction)
            if value is None:
                raise ValueError(expected("a backward pass before saliency()", "none", name))
            if value.shape[0] != len(active):  # masked execution measures every channel
                value = value[active.to(value.device).indices]
            result[name] = value
        return result

    def _meter(self, group: str) -> SaliencyMeter:
        return self._execution.meter(self, self.groups[group])

    @property
    def compact_grads(self) -> dict[str, CompactGrad]:
        """Gradients of active slices by parameter name, with their sets (see `CompactGrad`)."""
        found = {}
        for name, slot in parameter_slots(self):
            gradient = slot.gradient()
            if gradient is not None:
                found[name] = gradient
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, compact ones and saliency too."""
        super().zero_grad(set_to_none)
        for _, slot in parameter_slots(self):
            slot.zero_grad()
        for name in self._active:
            self._meter(name).reset()

    def slots(self) -> dict[str, Any]:
        """Return the parameter slots of layers that have none of their own (masked execution)."""
        return self._execution.slots(self)

    # --- copies -----------------------------------------------------------------------------------

    def skeleton(self) -> nn.Module:
        """Return the original architecture on the meta device: structure without values."""
        return copy.deepcopy(self._plain[0])

    def fill(self, skeleton: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Give a skeleton the tensors of ``state``, this model's mode and unsaved buffers."""
        skeleton.load_state_dict(state, assign=True)
        for name, buffer in self.named_buffers():
            if name not in state:
                owner, _, leaf = name.rpartition(".")
                skeleton.get_submodule(owner)._buffers[leaf] = buffer.detach().clone()
        return skeleton.train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChannelModel:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        compiled = self.__dict__["_forwards"]
        for key, value in self.__dict__.items():
            new.__dict__[key] = compiled if key == "_forwards" else copy.deepcopy(value, memo)
        return new


def _compile(root: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Return the graph as a function of (model, *inputs) that looks modules up in ``model``."""
    forward: Callable[..., Any] = type(fx.GraphModule(root, graph)).forward
    return forward

"""The converted model: the dense network's names and state_dict, only active channels between."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.graph.edit import compiled
from dcx_kernels.graph.execution import Execution
from dcx_kernels.graph.groups import ChannelGroup
from dcx_kernels.graph.loading import load_assign
from dcx_kernels.graph.saliency import group_saliency
from dcx_kernels.graph.sets import ActiveSets, owned
from dcx_kernels.graph.structure import Structure
from dcx_kernels.nn._forward import Forward
from dcx_kernels.nn._saliency import Reduction
from dcx_kernels.ops.slot import CompactGrad, parameter_slots, slots_of

__all__ = ["ChannelModel"]


class ChannelModel(nn.Module):
    """A network made by `dcx_kernels.convert`.

    Its modules, parameters and buffers carry the dense network's names. `train` and `eval` switch
    between two traced graphs. Between layers, tensors are compact (``execution="sparse"``), or
    dense and multiplied by 0/1 at the input of every consumer (``execution="mask"``, the papers'
    baseline and our oracle).

    Attributes:
        structure: groups, axes and graphs of the network.
        grads: ``"compact"``: under a `dcx_kernels.optim` optimizer, gradients are packed and no
            dense gradient exists; ``"dense"``: ordinary ``.grad`` with zeros, for every other
            optimizer. Without a dcx optimizer gradients are dense anyway.
    """

    def __init__(
        self,
        root: nn.Module,
        skeletons: tuple[nn.Module, nn.Module],
        structure: Structure,
        execution: Execution,
        example_shapes: list[tuple[int, ...]],
    ) -> None:
        super().__init__()
        self._modules, self._parameters = root._modules, root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        self.grads: Literal["compact", "dense"] = "compact"
        self.structure = structure
        self.example_shapes = example_shapes
        self._skeletons = skeletons  # in a tuple, so that nn.Module does not register them
        self._forward_pass = Forward()
        self._execution = execution
        self._saliency_reduction: Reduction | None = None
        self._active = {
            name: ChannelSet.full(group.num_channels)
            for name, group in structure.groups.items()
            if group.selectable
        }
        graphs = execution.prepare(self, structure, self._forward_pass)
        self._forwards = {mode: compiled(self, graph) for mode, graph in graphs.items()}
        execution.apply(self, self._active)
        # in hooks, which torch.compile(model) calls outside of its graphs
        outside = torch.compiler.disable(_before_forward), torch.compiler.disable(_after_forward)
        self.register_forward_pre_hook(outside[0], with_kwargs=True)
        self.register_forward_hook(outside[1], always_call=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        around = self._execution.around_forward(self)
        if around is None:
            return self._forwards[self.training](self, *args, **kwargs)
        with around:
            return self._forwards[self.training](self, *args, **kwargs)

    @property
    def groups(self) -> dict[str, ChannelGroup]:
        """Name -> `ChannelGroup`, in the order of the network."""
        return self.structure.groups

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
        # an equal set keeps the old object: identity means equal
        changed = {name: new for name, new in sets.items() if new != self._active[name]}
        taken = {id(old.indices) for name, old in self._active.items() if name not in changed}
        for name, new in changed.items():
            self._active[name] = owned(new, taken)
        if changed:
            self._execution.apply(self, self._active)
        self._forget_saliency()  # of the step before, under equal sets too

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
        if group.runs > 1 and len(set(new.counts_per_group(group.runs))) > 1:
            what = f"equally many channels in each of {group.runs} runs (a grouped convolution)"
            raise ValueError(expected(what, list(new.counts_per_group(group.runs)), name))

    @property
    def layer_sets(self) -> ActiveSets:
        """The active set of every layer's axes (see `Structure`)."""
        return self._execution.sets

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
        self._execution.measure(self, reduction)

    def saliency(self, reduction: Reduction = "batch") -> dict[str, Tensor]:
        """Return the saliency of the active channels of every selectable group, in set order.

        It covers the backward passes since `set_active` or `zero_grad`: micro-batches add up. A
        group that several norms measure gets the absolute value of the signed sum over all of them.

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
        meters = self._execution.meters(self)
        return group_saliency(self.structure, self._execution.sets, self._active, meters, reduction)

    def _forget_saliency(self) -> None:
        for meter in self._execution.meters(self).values():
            meter.reset()

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
        for slot in slots_of(self):
            slot.zero_grad()
        self._forget_saliency()

    def slots(self) -> dict[str, Any]:
        """Return the parameter slots of layers that have none of their own (masked execution)."""
        return self._execution.slots(self)

    # --- copies -----------------------------------------------------------------------------------

    def skeleton(self, as_traced: bool = False) -> nn.Module:
        """Return the original architecture on the meta device: structure without values.

        ``as_traced``: with the layers that the graphs call, see `functional`.
        """
        return copy.deepcopy(self._skeletons[as_traced])

    def fill(self, skeleton: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Give a skeleton the tensors of ``state``, this model's mode and unsaved buffers."""
        load_assign(skeleton, state)
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


def _before_forward(model: ChannelModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make what the layers read, see `dcx_kernels.nn._forward`."""
    x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    model._forward_pass.begin(model._execution.operands(x))


def _after_forward(model: ChannelModel, inputs: Any, output: Any) -> None:
    model._forward_pass.end()

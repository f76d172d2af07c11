"""What it takes to run a converted network: one protocol, two ways (`sparse`, `mask`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, fx, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph.sets import ActiveSets
from dcx_kernels.graph.structure import Structure
from dcx_kernels.nn._forward import Forward, Operands
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["Execution", "Sets"]

Sets = Mapping[str, ChannelSet]


class Execution(Protocol):
    """How a `ChannelModel` computes. The model's modules were prepared by `prepare`."""

    name: str
    sets: ActiveSets

    def prepare(
        self, root: nn.Module, structure: Structure, forward: Forward
    ) -> dict[bool, fx.Graph]:
        """Replace layers of ``root``, once; return the graphs to run, by training mode."""

    def apply(self, model: nn.Module, active: Sets) -> None:
        """Tell the layers their sets."""

    def measure(self, model: nn.Module, reduction: Reduction | None) -> None:
        """Switch saliency measurement."""

    def meters(self, model: nn.Module) -> dict[str, SaliencyMeter]:
        """Return the meter of every measured layer, by the layer's name."""

    def slots(self, model: nn.Module) -> dict[str, ParameterSlot]:
        """Return slots of parameters whose layers have none of their own."""

    def operands(self, x: Tensor) -> dict[str, Operands]:
        """Make what the layers need for a forward pass of x, an input of the network."""

    def around_forward(self, model: nn.Module) -> AbstractContextManager[None] | None:
        """Wrap a forward pass, if it needs that."""

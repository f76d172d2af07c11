"""What it takes to run a converted network: one protocol, two ways (`sparse`, `mask`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph.groups import ChannelGroup, Member
from dcx_kernels.graph.trace import Program
from dcx_kernels.nn._saliency import Reduction, SaliencyMeter
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["Execution", "Groups", "Sets", "measured_at"]

Groups = Mapping[str, ChannelGroup]
Sets = Mapping[str, ChannelSet]


class Execution(Protocol):
    """How a `ChannelModel` computes. The model's modules were prepared by `prepare`."""

    name: str

    def prepare(self, root: nn.Module, programs: dict[bool, Program], groups: Groups) -> None:
        """Replace layers of ``root``, or edit the graphs, once."""

    def apply(self, model: nn.Module, groups: Groups, active: Sets) -> None:
        """Tell the layers their sets."""

    def measure(self, model: nn.Module, groups: Groups, reduction: Reduction | None) -> None:
        """Switch saliency measurement."""

    def meter(self, model: nn.Module, group: ChannelGroup) -> SaliencyMeter:
        """Return the meter of a group."""

    def slots(self, model: nn.Module) -> dict[str, ParameterSlot]:
        """Return slots of parameters whose layers have none of their own."""

    def around_forward(self, model: nn.Module) -> AbstractContextManager[None]:
        """Wrap a forward pass."""


def measured_at(group: ChannelGroup) -> Member:
    """Return where a group's saliency is taken: its norm, or the producer where there is none.

    Before a norm in training mode the signed sum vanishes by scale invariance: rounding noise only.
    """
    return (group.of_role("norm") or group.of_role("producer"))[0]

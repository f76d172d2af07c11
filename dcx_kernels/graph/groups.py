"""Channel groups: which channel axes of a network must agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["ChannelGroup", "Member", "Role"]

Role = Literal["producer", "norm", "follower", "consumer"]


class Member(NamedTuple):
    """One channel axis that holds channels of a group.

    Attributes:
        module: name of the layer.
        role: ``producer``: output of a conv or linear; ``norm``: a batch norm; ``follower``:
            another layer with parameters per channel (depthwise conv, PReLU); ``consumer``: input
            of a conv or linear.
        inner: features each channel has there (pixels, once a feature map is flattened).
        positions: where on the axis the group's channels stand, in the group's order; a range
            where they stand in one run, as after a concatenation.
    """

    module: str
    role: Role
    inner: int
    positions: range | tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """All channel axes that must agree, as in DepGraph (https://arxiv.org/abs/2301.12900).

    Attributes:
        num_channels: channels of the dense network.
        members: axes, in the order of the graph; the first producer names the group.
        selectable: whether its channels may be switched off.
        reason: why not, when not; else empty.
        runs: a set must hold equally many channels in each of ``runs`` equal runs (more than 1
            where a grouped convolution is pruned).
    """

    num_channels: int
    members: tuple[Member, ...]
    selectable: bool = True
    reason: str = ""
    runs: int = 1

    def of_role(self, role: Role) -> list[Member]:
        """Return the members of one role."""
        return [member for member in self.members if member.role == role]

"""Channel groups: which channel axes of a network must agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["ChannelGroup", "GroupBuilder", "Layout", "Member"]

Role = Literal["producer", "norm", "consumer"]


class Member(NamedTuple):
    """One channel axis of a group: the output of a producer, a norm, or the input of a consumer.

    ``inner`` is the number of features each channel has there (pixels, once a feature map is
    flattened).
    """

    module: str
    role: Role
    inner: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """All channel axes that must agree, as in DepGraph (https://arxiv.org/abs/2301.12900).

    Attributes:
        num_channels: channels of the dense network.
        members: axes, in the order of the graph; the first producer names the group.
        selectable: whether its channels may be switched off.
        reason: why not, when not; else empty.
    """

    num_channels: int
    members: tuple[Member, ...]
    selectable: bool = True
    reason: str = ""

    def of_role(self, role: Role) -> list[Member]:
        """Return the members of one role."""
        return [member for member in self.members if member.role == role]


class Layout(NamedTuple):
    """What dim 1 of a tensor holds: the channels of a group, ``inner`` features each."""

    group: str
    inner: int = 1


class GroupBuilder:
    """Collects groups while rules walk a graph; groups found to be one are merged (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._channels: dict[str, int] = {}
        self._members: dict[str, list[Member]] = {}
        self._reasons: dict[str, str] = {}

    def produce(self, module: str, num_channels: int) -> Layout:
        """Open the group of a producer's output, or return it if the graph was here before."""
        if module not in self._parent:
            self._parent[module] = module
            self._channels[module] = num_channels
            self._members[module] = []
        self.join(module, Member(module, "producer"))
        return Layout(self.find(module))

    def find(self, group: str) -> str:
        """Return the name of the group that ``group`` was merged into."""
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def join(self, group: str, member: Member) -> None:
        """Add an axis; an axis that already belongs to another group merges the two."""
        group = self.find(group)
        for other in list(self._members):
            root = self.find(other)
            if root == group:
                continue
            if any(m[:2] == member[:2] for m in self._members[root]):
                group = self._merge(root, group)
        if member not in self._members[group]:
            self._members[group].append(member)

    def _merge(self, first: str, second: str) -> str:
        self._parent[second] = first
        self._members[first] += [
            m for m in self._members.pop(second) if m not in self._members[first]
        ]
        if second in self._reasons:
            self._reasons.setdefault(first, self._reasons.pop(second))
        return first

    def keep(self, group: str, reason: str) -> None:
        """Keep a group full-width; the first reason stands."""
        self._reasons.setdefault(self.find(group), reason)

    def build(self) -> dict[str, ChannelGroup]:
        """Return the finished groups in the order of the graph."""
        groups = {}
        for name in self._channels:
            if self.find(name) == name:
                reason = self._reasons.get(name, "")
                members = tuple(self._members[name])
                groups[name] = ChannelGroup(self._channels[name], members, not reason, reason)
        return groups

"""What a network is made of, for everything that runs, counts or cuts it: groups, axes, steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from dcx_kernels.graph.groups import ChannelGroup, Member, Role
from dcx_kernels.graph.layout import ABSENT, ALWAYS, ChannelTable, Ids, Layout, Union
from dcx_kernels.graph.rules import rule_of
from dcx_kernels.graph.rules.reshape import sizes_of
from dcx_kernels.graph.trace import Program
from dcx_kernels.graph.walk import Axes, Consume, Flatten, Join, Policy, Select, Step, Walk

__all__ = ["Structure", "Traced", "find_structure", "flattens"]


class Traced(NamedTuple):
    """A graph as it was traced, and what is to be done at its nodes once sets are known.

    Only steps whose channels may be switched off are there.
    """

    graph: fx.Graph
    steps: dict[fx.Node, Step]
    shapes: dict[str, tuple[int, ...]]

    def works_at_any_width(self, node: fx.Node) -> bool:
        """Tell whether a node needs no change when channels are missing."""
        step = self.steps[node]
        return isinstance(step, Consume) or (
            isinstance(step, Flatten) and not step.apart and flattens(node)
        )


@dataclass(frozen=True, eq=False)
class Structure:
    """Groups and axes of both graphs of a network. Never changes; copies of a model share it.

    Attributes:
        groups: name -> group, in the order of the network.
        channels: name -> numbers of the group's channels.
        unions: sums of unlike branches, each after its terms.
        free: for every channel number, whether the channel may ever be absent.
        axes: module -> its channel axes, of layers that some set may narrow.
        programs: training mode -> graph and steps.
        measured: group -> layers whose saliency adds up to its own.
        output_pixels: module -> P * Q of its output, over all its calls in evaluation.
        macs: multiply-accumulates of one sample in evaluation, all channels active.
        policy: how channels that meet were treated.
    """

    groups: dict[str, ChannelGroup]
    channels: dict[str, Ids]
    unions: list[Union]
    free: NDArray[np.bool_]
    axes: dict[str, Axes]
    programs: dict[bool, Traced]
    measured: dict[str, list[str]]
    output_pixels: dict[str, int]
    macs: int
    policy: Policy

    @cached_property
    def measuring(self) -> list[str]:
        """Every layer that measures the saliency of some group, once."""
        return list(dict.fromkeys(name for names in self.measured.values() for name in names))

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self


def find_structure(model: nn.Module, programs: dict[bool, Program], policy: Policy) -> Structure:
    """Walk both graphs until nothing new is found: a late tie binds a graph's beginning too."""
    modules = dict(model.named_modules(remove_duplicate=False))
    table = ChannelTable()
    while True:
        before, axes = table.state, dict[str, Axes]()
        walks = {
            mode: Walk(modules, program, table, axes, policy, rule_of)
            for mode, program in programs.items()
        }
        if table.state == before:
            break
    channels, groups = _groups(modules, table, axes)
    free = _free(table, channels, groups)
    return Structure(
        groups,
        channels,
        [Union(u.start, [table.resolve(part) for part in u.parts]) for u in table.unions],
        free,
        {name: a for name, a in axes.items() if free[a.out.ids].any() or free[a.in_.ids].any()},
        {
            mode: Traced(programs[mode].graph, _free_steps(w.steps, free), programs[mode].shapes)
            for mode, w in walks.items()
        },
        {name: _measured(axes, g, channels[name]) for name, g in groups.items() if g.selectable},
        programs[False].pixels,
        programs[False].macs,
        policy,
    )


def flattens(node: fx.Node) -> bool:
    """Tell whether a node merges all dims behind the batch without naming a width."""
    sizes = sizes_of(node)
    return not sizes or (len(sizes) == 2 and sizes[1] == -1)


def _groups(
    modules: dict[str, nn.Module], table: ChannelTable, axes: dict[str, Axes]
) -> tuple[dict[str, Ids], dict[str, ChannelGroup]]:
    channels, groups = {}, {}
    found = table.found()
    members = _members(axes, {name: ids for name, (ids, _, _) in found.items()}, len(table))
    for name, (ids, runs, reason) in found.items():
        producers = [modules[m.module] for m in members[name] if m.role == "producer"]
        if not reason and producers and all(isinstance(p, nn.Linear) for p in producers):
            reason = "fully connected: the papers select convolution channels only"
        channels[name] = ids
        groups[name] = ChannelGroup(len(ids), tuple(members[name]), not reason, reason, runs)
    return channels, groups


def _members(
    axes: dict[str, Axes], channels: dict[str, Ids], total: int
) -> dict[str, list[Member]]:
    """Find, in one pass over the axes, where the channels of every group stand."""
    names = list(channels)
    members: dict[str, list[Member]] = {name: [] for name in names}
    group_of = np.full(total, -1)
    for number, ids in enumerate(channels.values()):
        group_of[ids] = number
    for module, axis in axes.items():
        for role, layout in _sides(axis):
            there = group_of[layout.ids]
            for number in dict.fromkeys(there.tolist()):
                if number >= 0:
                    found = np.flatnonzero(there == number)
                    order = found[np.argsort(layout.ids[found], kind="stable")]
                    member = Member(module, role, layout.inner, _positions(order))
                    members[names[number]].append(member)
    return members


def _sides(axis: Axes) -> list[tuple[Role, Layout]]:
    if axis.kind == "mixing":
        return [("producer", axis.out), ("consumer", axis.in_)]
    return [(axis.kind, axis.out)]


def _positions(order: Ids) -> range | tuple[int, ...]:
    run = range(int(order[0]), int(order[0]) + len(order))
    return run if np.array_equal(order, run) else tuple(order.tolist())


def _free(
    table: ChannelTable, channels: dict[str, Ids], groups: dict[str, ChannelGroup]
) -> NDArray[np.bool_]:
    """Tell for every channel number whether the channel may ever be absent."""
    free = np.zeros(len(table), dtype=bool)
    free[ABSENT] = any(group.selectable for group in groups.values())
    for name, ids in channels.items():
        free[ids] = groups[name].selectable
    for union in table.unions:
        free[union.ids] = np.all([free[table.resolve(part)] for part in union.parts], axis=0)
    free[ALWAYS] = False
    return free


def _free_steps(steps: dict[fx.Node, Step], free: NDArray[np.bool_]) -> dict[fx.Node, Step]:
    return {node: step for node, step in steps.items() if any(free[i].any() for i in _ids(step))}


def _ids(step: Step) -> list[Ids]:
    if isinstance(step, Join):
        return [layout.ids for _, layout in step.terms]
    return [step.layout.ids, step.out.ids] if isinstance(step, Select) else [step.layout.ids]


def _measured(axes: dict[str, Axes], group: ChannelGroup, ids: Ids) -> list[str]:
    """Return where a group's saliency is taken: its norms, or where it has none its producers.

    Before a norm in training mode the signed sum vanishes by scale invariance: rounding noise only.
    """
    norms = [member.module for member in group.of_role("norm")]
    if norms and np.isin(ids, np.concatenate([axes[name].out.ids for name in norms])).all():
        return norms
    return [member.module for member in group.of_role("producer")]

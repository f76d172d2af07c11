"""Sets that never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.selectors.base import GroupsLike, Selector
from dcx_kernels.selectors.state import State, check_state

__all__ = ["Static"]


class Static(Selector):
    """The same sets in every step and in the end: a frozen topology.

    Args:
        sets: group name -> its channels.
        groups: ``model.groups``, to hold the sets against; None for groups without runs. There
            must be a set for each selectable group, and none for others.

    Attributes:
        budget: channels active in each step.

    Raises:
        ValueError: if there is no set, or naming the group that ``groups`` has otherwise, or whose
            runs have not all the same number of active channels.
    """

    needs_saliency = False

    def __init__(self, sets: Mapping[str, ChannelSet], groups: GroupsLike | None = None) -> None:
        sizes = {name: s.num_channels for name, s in sets.items()}
        super().__init__(sizes if groups is None else groups)
        if not sets:
            raise ValueError(expected("at least one set", "none"))
        for name in sizes:
            if name not in self.groups:
                raise ValueError(expected(f"sets of {list(self.groups)}", repr(name)))
        for name, size in self.groups.items():
            if sizes.get(name) != size:
                got = f"one of {sizes[name]}" if name in sizes else "none"
                raise ValueError(expected(f"a set of {size} channels", got, where=name))
        self._sets = {name: sets[name] for name in self.groups}
        self._check_runs(self._layout.mask(self._sets))

    @property
    def budget(self) -> int:
        """Channels active in each step."""
        return sum(map(len, self._sets.values()))

    def select(self) -> dict[str, ChannelSet]:
        """Return the sets."""
        return dict(self._sets)

    def update(self, saliency: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def final(self) -> dict[str, ChannelSet]:
        """Return the sets."""
        return dict(self._sets)

    def state_dict(self) -> State:
        """Return the sets as one bool mask over the channels of all groups."""
        mask = self._layout.mask(self._sets)
        return {"kind": "Static", "groups": self._groups_json(), "mask": mask}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the sets of ``state``, which may be others, of the same groups.

        Raises:
            ValueError: naming the entry that disagrees; nothing has changed then.
        """
        check_state(state, self.state_dict(), (), where="Static")
        mask = cast(Tensor, state["mask"]).cpu()
        self._check_runs(mask)
        self._sets = self._layout.sets(mask)

    def _check_runs(self, mask: Tensor) -> None:
        for name, counts in zip(self.groups, self._layout.run_counts(mask), strict=True):
            if not any(counts):
                raise ValueError(expected("at least one channel", "an empty set", where=name))
            if min(counts) < max(counts):
                what = f"the same number of channels in each of {len(counts)} runs"
                raise ValueError(expected(what, counts, where=name))

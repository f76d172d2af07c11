"""Sets that never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.selectors.base import Selector
from dcx_kernels.selectors.state import State, check_state

__all__ = ["Static"]


class Static(Selector):
    """The same sets in every step and in the end: a frozen topology.

    Args:
        sets: group name -> its channels.

    Attributes:
        budget: channels active in each step.

    Raises:
        ValueError: if there is no set.
    """

    needs_saliency = False

    def __init__(self, sets: Mapping[str, ChannelSet]) -> None:
        super().__init__({name: s.num_channels for name, s in sets.items()})
        if not sets:
            raise ValueError(expected("at least one set", "none"))
        self._sets = dict(sets)

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
        counts = torch.bincount(self._layout.group_of[mask], minlength=len(self.groups))
        for name, count in zip(self.groups, counts.tolist(), strict=True):
            if not count:
                raise ValueError(expected("at least one channel", "an empty set", where=name))
        self._sets = self._layout.sets(mask)

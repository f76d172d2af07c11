"""Random channels: the baseline every selection has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.selectors.base import GroupsLike, Selector
from dcx_kernels.selectors.covering import random_mask
from dcx_kernels.selectors.ranking import channel_budget, feasible_budget
from dcx_kernels.selectors.state import State, check_state, read_generator

__all__ = ["Random"]

_FIXED = ("density", "min_active", "round_to", "seed")
_FINAL = 0x5EED  # tells the generator of the final set from that of the steps


class Random(Selector):
    """New random sets of exactly the global budget in every step, and a random final set.

    There are no statistics: each `select` is a new draw, `update` takes anything and does nothing.

    Args:
        groups: ``model.groups`` or {name: num_channels}.
        density: kept fraction of all selectable channels.
        min_active: least channels of a group; with runs, rounded up to as many in each.
        round_to: grid of the group widths, see `global_top`.
        seed: of the selector's own generator.

    Attributes:
        budget: channels active in each step: what ``density`` keeps, rounded down; where groups
            have runs, what is nearest to it, see `ranking.feasible_budget`.

    Raises:
        ValueError: if an argument is out of range, the budget cannot hold ``min_active``, or the
            runs of a group do not divide its channels.

    References:
        Dynamic Neural Network Channel Execution for Efficient Training,
        https://arxiv.org/abs/1905.06435, section 3.4 (the final set of its random baseline).
    """

    needs_saliency = False

    def __init__(
        self,
        groups: GroupsLike,
        density: float,
        min_active: int = 1,
        round_to: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(groups)
        self.density, self.min_active, self.round_to = float(density), min_active, round_to
        self.seed = seed
        budget = channel_budget(self._layout.num_channels, density)
        self.budget = feasible_budget(self._layout, budget, min_active, round_to)
        self._generator = torch.Generator().manual_seed(seed)

    def select(self) -> dict[str, ChannelSet]:
        """Return new random sets; every call moves the generator."""
        return self._draw(self._generator)

    def update(self, saliency: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def final(self) -> dict[str, ChannelSet]:
        """Return a random set that depends on nothing but the arguments, the seed among them."""
        generator = torch.Generator().manual_seed(self.seed)
        generator.manual_seed(generator.initial_seed() ^ _FINAL)
        return self._draw(generator)

    def state_dict(self) -> State:
        """Return the generator's state and the arguments."""
        return {
            "kind": "Random",
            "groups": self._groups_json(),
            "density": self.density,
            "min_active": self.min_active,
            "round_to": self.round_to,
            "seed": self.seed,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue the sequence of draws from ``state``.

        Raises:
            ValueError: naming the entry that disagrees; nothing has changed then.
        """
        check_state(state, self.state_dict(), _FIXED, where="Random")
        self._generator = read_generator(state["generator"], where="Random")

    def _draw(self, generator: torch.Generator) -> dict[str, ChannelSet]:
        limits = (self.budget, self.min_active, self.round_to)
        return self._layout.sets(random_mask(self._layout, *limits, generator))

"""Channel selection as a combinatorial bandit: CUCB of dynamic channel execution.

References:
    Dynamic Neural Network Channel Execution for Efficient Training,
    https://arxiv.org/abs/1905.06435, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.selectors.base import GroupsLike, Selector
from dcx_kernels.selectors.covering import covering_mask, covering_steps, random_mask
from dcx_kernels.selectors.normalize import l2_normalize
from dcx_kernels.selectors.ranking import channel_budget, feasible_budget, top_mask
from dcx_kernels.selectors.state import State, check_state, read_generator

__all__ = ["CUCB"]

_FIXED = ("density", "tau", "min_active", "round_to", "seed")


class CUCB(Selector):
    """Combinatorial upper confidence bound over all channels of the network.

    Every channel is an arm, the set of active channels the super arm. Initialisation shows each
    channel once, in random sets of exactly the budget; then the channels with the largest upper
    confidence bound on their mean normalised saliency are active. Channels of a group with runs
    are chosen in rows, one of each run, by the mean of their bounds: see `global_top`.

    `select` draws once and then returns the same sets until `update` was called: statistics and
    time do not depend on how often it is called. Only the random draw of the initialisation, one
    per step, moves the generator.

    Args:
        groups: ``model.groups`` or {name: num_channels}.
        density: kept fraction of all selectable channels; the budget is global.
        tau: None: initialise with a random partition of the channels until each was active, then
            count time from N, as the paper does. An int: exactly that many independent random
            sets, then count from tau, as its posters do; a channel never drawn has an infinite
            bound.
        min_active: least channels of a group; with runs, rounded up to as many in each.
        round_to: grid of the group widths, see `global_top`.
        seed: of the selector's own generator.

    Attributes:
        budget: channels active in each step: what ``density`` keeps, rounded down; where groups
            have runs, what is nearest to it, see `ranking.feasible_budget`.
        num_steps: updates so far.
        covering_steps: steps the initialisation is planned to take (``tau=None`` with
            ``round_to > 1``, or with groups of different numbers of runs, may need a few more;
            `initialising` is exact).

    Raises:
        ValueError: if an argument is out of range, the budget cannot hold ``min_active``, or the
            runs of a group do not divide its channels.
    """

    def __init__(
        self,
        groups: GroupsLike,
        density: float = 0.4,
        tau: int | None = None,
        min_active: int = 1,
        round_to: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(groups)
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int) or tau < 1):
            raise ValueError(expected("tau to be None or an int of at least 1", repr(tau)))
        self.density, self.tau = float(density), tau
        self.min_active, self.round_to, self.seed = min_active, round_to, seed
        budget = channel_budget(self._layout.num_channels, density)
        self.budget = feasible_budget(self._layout, budget, min_active, round_to)
        self.covering_steps = tau or covering_steps(self._layout, self.budget, min_active)
        self.num_steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        # Algorithm 1, line 1: T and mu of every channel
        self._pulls = torch.zeros(self._layout.num_channels, dtype=torch.int64)
        self._mean = torch.zeros(self._layout.num_channels, dtype=torch.float64)
        self._time = 0
        self._pending: Tensor | None = None
        self._sets: dict[str, ChannelSet] = {}

    @property
    def initialising(self) -> bool:
        """Whether the next sets are drawn at random."""
        return self._time == 0

    @property
    def mean(self) -> dict[str, Tensor]:
        """Mean normalised saliency of each channel, (num_channels,) float64; 0 if never active."""
        return self._layout.split(self._mean)

    @property
    def scores(self) -> dict[str, Tensor]:
        """The means: what `final` ranks channels by."""
        return self.mean

    @property
    def num_pulls(self) -> dict[str, Tensor]:
        """How often each channel was active, (num_channels,) int64."""
        return self._layout.split(self._pulls)

    def select(self) -> dict[str, ChannelSet]:
        """Return the sets of the next step; the same ones until `update` is called."""
        if self._pending is None:
            self._pending = self._choose()
            self._sets = self._layout.sets(self._pending)
        return dict(self._sets)

    def update(self, saliency: Mapping[str, Tensor]) -> None:
        """Move mean and count of the channels that `select` chose.

        Raises:
            RuntimeError: if nothing was selected since the last update.
            ValueError: if a group is missing, unknown, or not as long as its set.
            NonFiniteError: if a saliency is NaN or infinite. Nothing has changed in any of these.
        """
        if self._pending is None:
            raise RuntimeError(expected("select() before update()", "no selection to update"))
        counts = [len(self._sets[name]) for name in self.groups]
        flat = self._read_saliency(saliency, counts)
        active = self._pending.nonzero().flatten()
        segments = self._layout.group_of.index_select(0, active)
        reward = l2_normalize(flat, segments, len(counts))  # eq. 3
        # Algorithm 1, lines 2 and 11: T, and mu = (sum of the observed saliencies) / T
        pulls = self._pulls.index_select(0, active) + 1
        mean = self._mean.index_select(0, active)
        self._mean.scatter_(0, active, mean + (reward - mean) / pulls)
        self._pulls.scatter_(0, active, pulls)
        self.num_steps += 1
        self._pending = None
        if not self.initialising:
            self._time += 1
        elif self.tau is not None and self.num_steps == self.tau:
            self._time = self.tau
        elif self.tau is None and bool((self._pulls > 0).all()):
            self._time = self._layout.num_channels  # line 3

    def final(self) -> dict[str, ChannelSet]:
        """Return the global top by mean saliency, without the bonus (Algorithm 1, line 12)."""
        return self._layout.sets(self._top(self._mean))

    def state_dict(self) -> State:
        """Return statistics, time, the pending selection, the generator and the arguments."""
        pending = torch.zeros_like(self._pulls, dtype=torch.bool)
        return {
            "kind": "CUCB",
            "groups": self._groups_json(),
            "density": self.density,
            "tau": self.tau,
            "min_active": self.min_active,
            "round_to": self.round_to,
            "seed": self.seed,
            "num_steps": self.num_steps,
            "time": self._time,
            "num_pulls": self._pulls.clone(),
            "mean": self._mean.clone(),
            # all false: no selection is pending
            "pending": pending if self._pending is None else self._pending.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from ``state``, a pending selection included.

        Raises:
            ValueError: naming the entry that disagrees or is impossible; nothing has changed then.
        """
        check_state(state, self.state_dict(), _FIXED, where="CUCB")
        pulls, mean, pending = (
            cast(Tensor, state[key]).cpu().clone() for key in ("num_pulls", "mean", "pending")
        )
        num_steps, time = cast(int, state["num_steps"]), cast(int, state["time"])
        for key, good in (
            ("num_steps", num_steps >= 0),
            ("time", time >= 0),
            ("num_pulls", int(pulls.min()) >= 0 and int(pulls.max()) <= num_steps),
            ("mean", bool(mean.isfinite().all())),
            ("pending", self._possible(pending)),
        ):
            if not good:
                raise ValueError(expected(f"a possible {key!r} in the state", state[key], "CUCB"))
        self._generator = read_generator(state["generator"], where="CUCB")
        self._pulls, self._mean, self.num_steps, self._time = pulls, mean, num_steps, time
        self._pending = pending if bool(pending.any()) else None
        self._sets = self._layout.sets(pending) if self._pending is not None else {}

    def _choose(self) -> Tensor:
        layout, limits = self._layout, (self.budget, self.min_active, self.round_to)
        if not self.initialising:
            # lines 6 and 7: t <- t + 1, then mu + sqrt(3 ln t / (2 T)); infinite where T = 0
            squares = 1.5 * math.log(self._time + 1) / self._pulls.double()
            # numpy's root: torch's starts threads here, see layout.py
            return self._top(self._mean + torch.from_numpy(squares.numpy() ** 0.5))
        if self.tau is not None:
            return random_mask(layout, *limits, self._generator)
        left = max(1, self.covering_steps - self.num_steps)
        return covering_mask(self._pulls > 0, left, layout, *limits, self._generator)

    def _top(self, scores: Tensor) -> Tensor:
        return top_mask(scores, self._layout, self.budget, self.min_active, self.round_to)

    def _possible(self, pending: Tensor) -> bool:
        """Whether ``pending`` is a selection of the budget, even over the runs, or none at all."""
        total = int(pending.sum())
        even = all(0 < min(runs) == max(runs) for runs in self._layout.run_counts(pending))
        return total == 0 or (total <= self.budget and even)

"""Channel selection by accumulated utility: dynamic channel propagation.

References:
    Learning to Prune in Training via Dynamic Channel Propagation,
    https://arxiv.org/abs/2007.01486, Algorithm 1.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from operator import mul
from typing import Literal, cast

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.selectors.base import GroupsLike, Selector
from dcx_kernels.selectors.normalize import max_normalize
from dcx_kernels.selectors.ranking import feasible_budget, top_mask
from dcx_kernels.selectors.rows import form_rows
from dcx_kernels.selectors.state import State, check_state

__all__ = ["DCP", "DECAY_SCOPES", "INITIAL", "DecayScope", "Initial"]

DecayScope = Literal["selected", "all"]
Initial = Literal["zero", "inverse"]
DECAY_SCOPES, INITIAL = ("selected", "all"), ("zero", "inverse")
_ARGUMENTS = (
    "density",
    "decay",
    "warmup_steps",
    "strict",
    "decay_scope",
    "initial",
    "min_active",
    "round_to",
)


class DCP(Selector):
    """Global top by channel utility, a decayed sum of the saliency that a channel has shown.

    A channel that is not active keeps its utility, so one that never was active stays where it
    began: the warm-up, in which all are active, is what the first choice rests on. Without it the
    ties of equal utilities are broken by index, and that choice lasts. Channels of a group with
    runs are chosen in rows, one of each run, by the mean of their utilities: see `global_top`.

    Nothing is random: `select` returns the same sets until `update` was called.

    Args:
        groups: ``model.groups`` or {name: num_channels}.
        density: kept fraction of all selectable channels; the paper's pruning rate is
            p = 1 - density.
        decay: lambda of eq. 9, from 0 to 1; or {first step: lambda from there on}, from step 0 on,
            see `utility_decay`.
        warmup_steps: steps at the start in which all channels are active; utilities grow already.
        strict: take eq. 2 literally: active are channels of a utility greater than the pN-th
            smallest, which may be fewer than the budget where utilities tie; ``min_active`` holds.
        decay_scope: ``selected``: the utility of inactive channels stays (abstract and code of the
            paper); ``all``: it decays as well (eq. 9 to the letter).
        initial: utilities at the start: ``zero`` (the paper's code for VGG) or ``inverse``: one by
            the number of channels of the group (its code for ResNets).
        min_active: least channels of a group; with runs, rounded up to as many in each.
        round_to: grid of the group widths, see `global_top`.

    Attributes:
        budget: channels active in each step (with ``strict``: at most) once the warm-up is over:
            N less the nearest whole number to p N; where groups have runs, what is nearest to that,
            see `ranking.feasible_budget`.
        num_steps: updates so far.

    Raises:
        ValueError: if an argument is out of range, the budget cannot hold ``min_active``, or the
            runs of a group do not divide its channels.
    """

    def __init__(
        self,
        groups: GroupsLike,
        density: float,
        decay: float | Mapping[int, float] = 0.6,
        warmup_steps: int = 0,
        strict: bool = False,
        decay_scope: DecayScope = "selected",
        initial: Initial = "zero",
        min_active: int = 1,
        round_to: int = 1,
    ) -> None:
        super().__init__(groups)
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            what = "warmup_steps to be an int of at least 0"
            raise ValueError(expected(what, repr(warmup_steps)))
        for argument, given, allowed in (
            ("decay_scope", decay_scope, DECAY_SCOPES),
            ("initial", initial, INITIAL),
            ("strict", strict, (False, True)),
        ):
            if given not in allowed:
                raise ValueError(expected(f"{argument} out of {allowed}", repr(given)))
        self.decay = _read_decay(decay)
        self.density, self.warmup_steps, self.strict = float(density), warmup_steps, bool(strict)
        self.decay_scope, self.initial = decay_scope, initial
        self.min_active, self.round_to = min_active, round_to
        budget = _kept_channels(self._layout.num_channels, density)
        self.budget = feasible_budget(self._layout, budget, min_active, round_to)
        self.num_steps = 0
        self._utility = torch.zeros(self._layout.num_channels, dtype=torch.float64)
        if initial == "inverse":
            sizes = torch.tensor(self._layout.sizes, dtype=torch.float64)
            self._utility = sizes.reciprocal().index_select(0, self._layout.group_of)
        self._mask: Tensor | None = None  # of the last selection, and its sets
        self._sets: dict[str, ChannelSet] = {}
        self._pending = False

    @property
    def utility(self) -> dict[str, Tensor]:
        """Utility of each channel, (num_channels,) float64."""
        return self._layout.split(self._utility)

    @property
    def scores(self) -> dict[str, Tensor]:
        """The utilities: what `final` ranks channels by."""
        return self.utility

    @property
    def warming_up(self) -> bool:
        """Whether all channels are active in the next step."""
        return self.num_steps < self.warmup_steps

    @property
    def present_decay(self) -> float:
        """Lambda of the next update."""
        steps = list(self.decay)
        return self.decay[steps[bisect_right(steps, self.num_steps) - 1]]

    def select(self) -> dict[str, ChannelSet]:
        """Return the sets of the next step; the same ones until `update` is called."""
        if not self._pending:
            everything = torch.ones(self._layout.num_channels, dtype=torch.bool)
            mask = everything if self.warming_up else self._top()
            # most steps change nothing, and a model knows the sets that it has
            if self._mask is None or not torch.equal(mask, self._mask):
                self._mask, self._sets = mask, self._layout.sets(mask)
            self._pending = True
        return dict(self._sets)

    def update(self, saliency: Mapping[str, Tensor]) -> None:
        """Add the normalised saliency to the decayed utility of the channels that were selected.

        Raises:
            RuntimeError: if nothing was selected since the last update.
            ValueError: if a group is missing, unknown, or not as long as its set.
            NonFiniteError: if a saliency is NaN or infinite. Nothing has changed in any of these.
        """
        if not self._pending or self._mask is None:
            raise RuntimeError(expected("select() before update()", "no selection to update"))
        counts = [len(self._sets[name]) for name in self.groups]
        flat = self._read_saliency(saliency, counts)
        active = self._mask.nonzero().flatten()
        segments = self._layout.group_of.index_select(0, active)
        theta = max_normalize(flat, segments, len(counts))  # eq. 8
        decay = self.present_decay
        utility = self._utility * decay if self.decay_scope == "all" else self._utility.clone()
        # eq. 9
        new = self._utility.index_select(0, active) * decay + theta
        self._utility = utility.scatter_(0, active, new)
        self.num_steps += 1
        self._pending = False

    def final(self) -> dict[str, ChannelSet]:
        """Return the global top by the present utilities, in the warm-up too."""
        return self._layout.sets(self._top())

    def state_dict(self) -> State:
        """Return utilities, the number of steps and the arguments."""
        return {
            "kind": "DCP",
            "groups": self._groups_json(),
            "density": self.density,
            "decay": json.dumps(list(self.decay.items())),
            "warmup_steps": self.warmup_steps,
            "strict": self.strict,
            "decay_scope": self.decay_scope,
            "initial": self.initial,
            "min_active": self.min_active,
            "round_to": self.round_to,
            "num_steps": self.num_steps,
            "utility": self._utility.clone(),
            "pending": self._pending,  # which sets follows from the rest
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from ``state``, a pending selection included.

        Raises:
            ValueError: naming the entry that disagrees or is impossible; nothing has changed then.
        """
        check_state(state, self.state_dict(), _ARGUMENTS, where="DCP")
        utility = cast(Tensor, state["utility"]).cpu().clone()
        num_steps = cast(int, state["num_steps"])
        for key, good in (
            ("num_steps", num_steps >= 0),
            ("utility", bool(utility.isfinite().all())),
        ):
            if not good:
                raise ValueError(expected(f"a possible {key!r} in the state", state[key], "DCP"))
        self._utility, self.num_steps, self._pending = utility, num_steps, False
        if state["pending"]:
            self.select()

    def _top(self) -> Tensor:
        """Return the channels that the utilities choose, (N,) bool."""
        count = self._strict_count() if self.strict else self.budget
        return top_mask(self._utility, self._layout, count, self.min_active, self.round_to)

    def _strict_count(self) -> int:
        """Return how many channels eq. 2 makes active, those included that ``min_active`` adds.

        That many of the best are exactly these channels, as long as they are within the budget.
        """
        layout, utility = self._layout, self._utility
        pruned = layout.num_channels - self.budget
        if pruned == 0:
            return self.budget
        if layout.rows is not layout:  # whole rows, by their mean
            row_of, means = form_rows(utility, layout)
            utility = means.index_select(0, row_of)
        threshold = torch.sort(utility).values[pruned - 1]  # eq. 1
        above = (utility > threshold).nonzero().flatten()  # eq. 2
        groups = layout.group_of.index_select(0, above)
        counts: list[int] = torch.bincount(groups, minlength=len(layout.sizes)).tolist()
        least = map(mul, layout.floors(self.min_active), layout.runs)
        kept: int = sum(map(max, counts, least))
        return min(self.budget, kept)


def _kept_channels(num_channels: int, density: float) -> int:
    """Return N less the nearest whole number to p N, where p = 1 - density; halves are pruned."""
    if not 0 < density <= 1:
        raise ValueError(expected("density in (0, 1]", density))
    return num_channels - math.floor((1 - density) * num_channels + 0.5 + 1e-9)


def _read_decay(decay: float | Mapping[int, float]) -> dict[int, float]:
    """Return {first step: lambda}, in the order of the steps."""
    given = decay if isinstance(decay, Mapping) else {0: decay}
    if 0 not in given or any(type(step) is not int or step < 0 for step in given):
        what = "decay from step 0 on, at steps that are whole numbers"
        raise ValueError(expected(what, list(given)))
    for value in given.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(expected("decay from 0 to 1", repr(value)))
    return {step: float(given[step]) for step in sorted(given)}

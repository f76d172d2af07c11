"""What every selector is: sets out, saliency in."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import NonFiniteError, expected
from dcx_kernels.selectors.layout import GroupLayout
from dcx_kernels.selectors.state import State

__all__ = ["GroupLike", "GroupsLike", "Selector", "State"]


class GroupLike(Protocol):
    """The part of a channel group that a selector looks at.

    It may have an int attribute ``runs`` as well: its channels then form so many equal consecutive
    runs, and every set holds the same number of channels, at least one, in each of them.
    """

    @property
    def num_channels(self) -> int:
        """Channels of the group."""

    @property
    def selectable(self) -> bool:
        """Whether channels may be chosen; the group stays full otherwise."""


GroupsLike = Mapping[str, int] | Mapping[str, GroupLike]


class Selector(ABC):
    """A policy: `select` the sets of the next step, `update` from the saliency they showed.

    Statistics change in `update` only, so that a step that was not taken (a gradient scaler's
    overflow, say) leaves no trace when its update is left out.

    Args:
        groups: ``model.groups`` or a plain {name: num_channels}; groups that are not selectable
            are left out, in `select` and in `update`.

    Attributes:
        groups: {name: num_channels} of the groups chosen from, in order.
        needs_saliency: whether `update` looks at its argument; a trainer may save the work if not.

    Raises:
        ValueError: naming a group without channels, or whose runs do not divide them.
    """

    needs_saliency: bool = True

    def __init__(self, groups: GroupsLike) -> None:
        self.groups: dict[str, int] = {}
        self._ignored: set[str] = set()
        runs = []
        for name, group in groups.items():
            size = group if isinstance(group, int) else group.num_channels
            if isinstance(group, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(expected("a positive number of channels", repr(size), where=name))
            if isinstance(group, int) or group.selectable:
                self.groups[name] = size
                runs.append(getattr(group, "runs", 1))
            else:
                self._ignored.add(name)
        self._layout = GroupLayout(tuple(self.groups), tuple(self.groups.values()), tuple(runs))

    @abstractmethod
    def select(self) -> dict[str, ChannelSet]:
        """Return the sets of the next step, one for each selectable group."""

    @abstractmethod
    def update(self, saliency: Mapping[str, Tensor]) -> None:
        """Take in what the last step showed.

        Args:
            saliency: group name -> raw (not normalised) saliency of its active channels, in set
                order, (num_active,) floating, any device. Groups that are not selectable may be
                there; they are ignored.
        """

    @abstractmethod
    def final(self) -> dict[str, ChannelSet]:
        """Return the sets to keep if selection ended now; changes no state."""

    @property
    def scores(self) -> dict[str, Tensor]:
        """What channels are ranked by at present, (num_channels,) a group; empty if by nothing.

        For logs and figures.
        """
        return {}

    @abstractmethod
    def state_dict(self) -> State:
        """Return the whole state, flat: tensors, and scalars and strings that JSON can hold."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from ``state``, bit-identically.

        Raises:
            ValueError: naming the entry that disagrees; nothing has changed then.
        """

    def _groups_json(self) -> str:
        return json.dumps(self.groups)

    def _read_saliency(self, saliency: Mapping[str, Tensor], counts: list[int]) -> Tensor:
        """Check and concatenate the saliency of the active channels.

        Args:
            saliency: as `update` gets it.
            counts: active channels of each group in the last selected sets.

        Returns:
            (sum of counts,) float64 on the CPU, in group order; the one copy from the device.

        Raises:
            ValueError: if a group is missing, unknown, or not as long as its set.
            NonFiniteError: naming the group with a NaN or infinite saliency.
        """
        for name in saliency:
            if name not in self.groups and name not in self._ignored:
                raise ValueError(expected(f"saliency of {list(self.groups)}", repr(name)))
        parts = []
        for name, count in zip(self.groups, counts, strict=True):
            if name not in saliency:
                raise ValueError(expected("saliency of every selected group", "none", where=name))
            part = saliency[name].detach()
            if part.dim() != 1 or not part.is_floating_point():
                got = f"{part.dtype} of shape {tuple(part.shape)}"
                raise ValueError(expected("1-D floating saliency", got, where=name))
            if part.numel() != count:
                what = f"saliency of the {count} channels that were selected"
                raise ValueError(expected(what, f"{part.numel()} values", where=name))
            parts.append(part)
        flat = torch.cat(parts).to("cpu", torch.float64)
        wrong = ~flat.isfinite()
        if wrong.any():
            position = int(wrong.nonzero()[0])
            name = self._layout.names[int(self._layout.segments(counts)[position])]
            raise NonFiniteError(expected("finite saliency", float(flat[position]), where=name))
        return flat

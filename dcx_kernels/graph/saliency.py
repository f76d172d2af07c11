"""The saliency of channel groups, from what their layers measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.graph.sets import ActiveSets
from dcx_kernels.graph.structure import Structure
from dcx_kernels.nn._saliency import (
    Reduction,
    SaliencyMeter,
    check_reduction,
    mean_over_samples,
)

__all__ = ["group_saliency"]


def group_saliency(
    structure: Structure,
    sets: ActiveSets,
    active: Mapping[str, ChannelSet],
    meters: Mapping[str, SaliencyMeter],
    reduction: Reduction,
) -> dict[str, Tensor]:
    """Return {group: (num_active,)}.

    A group that several layers measure (a tied residual stream, channels of a dense block) gets,
    channel by channel, the signed sum over all of them, and only then the absolute value; the mean
    is over the elements of the first. Channels that exist as part of a sum of unlike branches are
    measured where they are still alone.

    Raises:
        ValueError: before the first backward, or if ``sample`` was not measured.
    """
    check_reduction(reduction)
    for name, measured in structure.measured.items():
        if name in active and all(meters[layer].signed is None for layer in measured):
            raise ValueError(expected(f"a backward pass before saliency of {name}", "none"))
    result, shared = {}, []
    for name in active:
        (first, *others) = structure.measured[name]
        whole = structure.axes[first].out.ids.tobytes() == structure.channels[name].tobytes()
        if others or not whole:
            shared.append(name)
            continue
        value = meters[first].read(reduction)
        assert value is not None
        result[name] = value
    if shared:
        result.update(_shared(structure, sets, shared, meters, reduction))
    return {name: result[name] for name in active}


def _shared(
    structure: Structure,
    sets: ActiveSets,
    groups: list[str],
    meters: Mapping[str, SaliencyMeter],
    reduction: Reduction,
) -> dict[str, Tensor]:
    """Add up what all layers measured, over all channel numbers at once."""
    layers = list(dict.fromkeys(n for group in groups for n in structure.measured[group]))
    layers = [name for name in layers if meters[name].signed is not None]
    totals = _Totals(structure, sets, layers)
    picks = {
        g: torch.from_numpy(structure.channels[g][sets.mask(structure.channels[g])]) for g in groups
    }
    result = {}
    if reduction == "batch":
        found = [meters[name].signed for name in layers]
        signed = totals.add([s for s in found if s is not None])
        for group, pick in picks.items():
            elements = _first(structure, meters, group).elements
            result[group] = (signed[pick.to(signed.device)] / elements).abs()
        return result
    numbers = sorted({number for name in layers for number in meters[name].samples})
    sums = {}
    for number in numbers:
        with_it = [name for name in layers if number in meters[name].samples]
        part = _Totals(structure, sets, with_it)
        sums[number] = part.add([meters[name].samples[number] for name in with_it])
    for group, pick in picks.items():
        mine = {number: total[:, pick.to(total.device)] for number, total in sums.items()}
        result[group] = mean_over_samples(mine, _first(structure, meters, group).pixels)
    return result


class _Totals:
    """Where each measured channel belongs among all channel numbers."""

    def __init__(self, structure: Structure, sets: ActiveSets, layers: list[str]) -> None:
        self._size = len(structure.free)
        lists = [structure.axes[name].out.ids for name in layers]
        self._index = [torch.from_numpy(ids[sets.mask(ids)]) for ids in lists]

    def add(self, sums: list[Tensor]) -> Tensor:
        """Add sums (..., k) of all layers: (..., number of channels)."""
        together = torch.cat(sums, -1)
        index = torch.cat(self._index).to(together.device)
        zeros = together.new_zeros(*together.shape[:-1], self._size)
        return zeros.index_add_(-1, index, together)


def _first(structure: Structure, meters: Mapping[str, SaliencyMeter], group: str) -> SaliencyMeter:
    return next(m for m in (meters[n] for n in structure.measured[group]) if m.signed is not None)

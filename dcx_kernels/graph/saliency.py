"""The saliency of channel groups, from what their layers measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
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
    layers = dict.fromkeys(name for group in groups for name in structure.measured[group])
    measured = {name: meters[name] for name in layers if meters[name].signed is not None}
    if reduction == "batch":
        signed = {name: meter.signed for name, meter in measured.items()}
        sums = {0: _add_up(structure, sets, signed)}
    else:
        numbers = sorted({number for meter in measured.values() for number in meter.samples})
        sums = {
            number: _add_up(
                structure, sets, {n: m.samples.get(number) for n, m in measured.items()}
            )
            for number in numbers
        }
    result = {}
    for group in groups:
        ids = structure.channels[group]
        pick = torch.from_numpy(ids[sets.mask(ids)])
        mine = {number: total[..., pick.to(total.device)] for number, total in sums.items()}
        first = next(measured[name] for name in structure.measured[group] if name in measured)
        if reduction == "batch":
            result[group] = (mine[0] / first.elements).abs()
        else:
            result[group] = mean_over_samples(mine, first.pixels)
    return result


def _add_up(structure: Structure, sets: ActiveSets, sums: Mapping[str, Tensor | None]) -> Tensor:
    """Add sums (..., k) over the active channels of layers: (..., number of channels)."""
    found = {name: signed for name, signed in sums.items() if signed is not None}
    together = torch.cat(list(found.values()), -1)
    lists = [structure.axes[name].out.ids for name in found]
    index = torch.from_numpy(np.concatenate([ids[sets.mask(ids)] for ids in lists]))
    zeros = together.new_zeros(*together.shape[:-1], len(structure.free))
    return zeros.index_add_(-1, index.to(together.device), together)

"""Cutting channels that no input ever chose: a smaller network with gates, the same function.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", appendix A, Table 4
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.fbs import FBSModel
from dcx_kernels.graph.fbs_cut import layer_of
from dcx_kernels.nn.gated_conv import GatedConv2d

__all__ = ["cut_unused"]


def cut_unused(model: FBSModel, counts: Mapping[str, Tensor]) -> FBSModel:
    """Return a smaller copy without the channels that nobody chose.

    As many channels win as before. A channel that an add joins with another is cut where neither
    was chosen; one that reaches anything else than gated layers, adds, pooling and the classifier
    stays (its zeros may matter there). The copy's ``state_dict`` says which channels are left: a
    network converted like the uncut one takes it with ``load_state_dict``.

    Args:
        model: made by `convert_fbs`.
        counts: of `count_winners`, over all the data that matters.

    Raises:
        ValueError: if a layer's counts are missing or of another length.
    """
    gated = model.gated
    for name, layer in gated.items():
        got = None if name not in counts else tuple(counts[name].shape)
        if got != (layer.out_channels,):
            raise ValueError(expected(f"counts of shape ({layer.out_channels},)", got, name))
    new = copy.deepcopy(model)
    new.cut_(_used(model, counts))
    return new


def _used(model: FBSModel, counts: Mapping[str, Tensor]) -> NDArray[np.bool_]:
    """Tell for every channel number of the network whether it has to stay."""
    used = ~model.structure.free
    for name, axis in model.axes.items():
        module = layer_of(model, name)
        if isinstance(module, GatedConv2d) and name not in model.fixed:
            chosen = counts[name].cpu().numpy() > 0
            used[axis.out.ids] |= chosen
            if not chosen.any():  # gates that never open: one channel of zeros stands for them
                used[axis.out.ids[0]] = True
        elif module is not None:
            used[axis.out.ids] = True
            if not isinstance(module, (nn.Conv2d, nn.Linear)):  # it changes channels in place
                used[axis.in_.ids] = True
    return used

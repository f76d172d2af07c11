"""Cutting channels that no input ever chose: a smaller network with gates, the same function.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", appendix A, Table 4
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.fbs import FBSModel
from dcx_kernels.graph.layout import Layout
from dcx_kernels.graph.walk import Axes
from dcx_kernels.nn.gated_conv import GatedConv2d

__all__ = ["cut_unused"]


@torch.no_grad()
def cut_unused(model: FBSModel, counts: Mapping[str, Tensor]) -> FBSModel:
    """Return a smaller copy without the channels that nobody chose.

    As many channels win as before. A channel that an add joins with another is cut where neither
    was chosen; one that reaches anything else than gated layers, adds, pooling and the classifier
    stays (its zeros may matter there).

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
    used = _used(model, counts)
    new = copy.deepcopy(model)
    for name, axis in model.axes.items():
        module = _layer(new, name)
        out = torch.from_numpy(used[axis.out.ids])
        in_ = torch.from_numpy(np.repeat(used[axis.in_.ids], axis.in_.inner))
        if isinstance(module, GatedConv2d):
            _cut_gated(module, out.to(module.weight.device), in_.to(module.weight.device))
        elif isinstance(module, nn.Conv2d):
            module.in_channels = int(in_.sum())
            module.weight = _kept(module.weight, in_, 1)
        elif isinstance(module, nn.Linear):
            module.in_features = int(in_.sum())
            module.weight = _kept(module.weight, in_, 1)
        # a second cut starts from the channels that are left
        new.axes[name] = Axes(axis.kind, _left(axis.out, used), _left(axis.in_, used))
    return new


def _used(model: FBSModel, counts: Mapping[str, Tensor]) -> NDArray[np.bool_]:
    """Tell for every channel number of the network whether it has to stay."""
    used = ~model.structure.free
    for name, axis in model.axes.items():
        module = _layer(model, name)
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


def _layer(model: FBSModel, name: str) -> nn.Module | None:
    """Return a layer; None for a norm that is part of a gated layer now."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path)._modules.get(leaf)


def _cut_gated(layer: GatedConv2d, out: Tensor, in_: Tensor) -> None:
    layer.out_channels = layer.norm.num_features = int(out.sum())
    layer.in_channels = int(in_.sum())
    for name in ("weight", "phi"):
        parameter = _kept(getattr(layer, name), out, 0)
        setattr(layer, name, _kept(parameter, in_, 1))
    for name in ("rho", "beta"):
        setattr(layer, name, _kept(getattr(layer, name), out, 0))
    for name in ("running_mean", "running_var"):
        layer.norm._buffers[name] = getattr(layer.norm, name)[out]


def _kept(parameter: Tensor, keep: Tensor, dim: int) -> nn.Parameter:
    at = keep.nonzero().flatten().to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, at), parameter.requires_grad)


def _left(layout: Layout, used: NDArray[np.bool_]) -> Layout:
    return Layout(layout.ids[used[layout.ids]], layout.inner)

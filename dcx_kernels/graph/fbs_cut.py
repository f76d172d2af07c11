"""Taking channels out of a network with gates, in place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcx_kernels.graph.layout import Layout
from dcx_kernels.graph.walk import Axes
from dcx_kernels.nn.gated_conv import GatedConv2d

__all__ = ["cut_channels_", "layer_of"]


@torch.no_grad()
def cut_channels_(
    model: nn.Module, axes: Mapping[str, Axes], left: NDArray[np.bool_]
) -> dict[str, Axes]:
    """Leave only some channels in every layer; return which of its channels a layer has then.

    Parameters that shrink are new ones: an optimizer made before holds the old.

    Args:
        model: the network.
        axes: layer -> which of its channels there are, as numbers of the whole network.
        left: for every channel number whether it stays.
    """
    fewer = {}
    for name, axis in axes.items():
        module = layer_of(model, name)
        out = torch.from_numpy(left[axis.out.ids])
        in_ = torch.from_numpy(np.repeat(left[axis.in_.ids], axis.in_.inner))
        if isinstance(module, GatedConv2d):
            _cut_gated(module, out.to(module.weight.device), in_.to(module.weight.device))
        elif isinstance(module, nn.Conv2d):
            module.in_channels = int(in_.sum())
            module.weight = _kept(module.weight, in_, 1)
        elif isinstance(module, nn.Linear):
            module.in_features = int(in_.sum())
            module.weight = _kept(module.weight, in_, 1)
        # a second cut starts from the channels that are left
        fewer[name] = Axes(axis.kind, _left(axis.out, left), _left(axis.in_, left))
    return fewer


def layer_of(model: nn.Module, name: str) -> nn.Module | None:
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


def _left(layout: Layout, left: NDArray[np.bool_]) -> Layout:
    return Layout(layout.ids[left[layout.ids]], layout.inner)

"""The thin model: active channels cut out as plain torch layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.shrink import layer_widths, shrink_, widths_in
from dcx_kernels.graph.thin import thin_graphs, thin_module
from dcx_kernels.ops.slot import parameter_slots

__all__ = ["compact", "is_plain", "thin_state"]


def compact(model: ChannelModel) -> nn.Module:
    """Return the thin network of the current sets, as plain torch.

    Its outputs are those of the converted model. Where narrow layers say it all, it is the original
    architecture; where compact tensors meet or part (``residual="union"``, slices, shuffles), its
    torch.fx graph with plain index operations. Nothing of dcx computes: torch.export, ONNX and
    every other tool see a plain model. Weights and running statistics are copies.

    Raises:
        TypeError: if ``model`` was not made by `convert`.
    """
    if not isinstance(model, ChannelModel):
        raise TypeError(expected("a model made by convert", type(model).__name__, "compact"))
    state = thin_state(model)
    if is_plain(model):
        thin = model.skeleton()
        shrink_(thin, _widths(state, thin))
        return model.fill(thin, state)
    layers = model.skeleton(as_traced=True)
    shrink_(layers, _widths(state, layers))
    layers = model.fill(layers, state)
    return thin_module(layers, thin_graphs(model, layers), type(model.skeleton()).__name__)


def is_plain(model: ChannelModel) -> bool:
    """Tell whether narrow layers in the original architecture compute the thin network."""
    traced = model.structure.programs.values()
    return all(t.works_at_any_width(node) for t in traced for node in t.steps)


@torch.no_grad()
def thin_state(model: ChannelModel) -> dict[str, Tensor]:
    """Return the state_dict of the thin network: every entry cut to the current sets, as copies."""
    state: dict[str, Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
    for name, slot in parameter_slots(model):
        rows = slot.rows()
        if rows is not None:
            state[name] = _not_empty(rows.gather(slot.parameter))
    for name, axes in model.structure.axes.items():
        active = model.layer_sets[axes.out] if axes.kind == "norm" else None
        for vector in (f"{name}.running_mean", f"{name}.running_var"):
            if active is not None and vector in state:
                cut = state[vector][active.to(state[vector].device).indices]
                state[vector] = _not_empty(cut)
    for name, first in _other_names(model).items():
        state[name] = state[first]
    return state


def _other_names(model: nn.Module) -> dict[str, str]:
    """Return further name -> first name of every tensor of a module that has several."""
    first: dict[nn.Module, str] = {}
    names: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(module, path)
        if known != path:
            tensors = (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            )
            names |= {f"{path}.{leaf}": f"{known}.{leaf}" for leaf, _ in tensors}
    return names


def _not_empty(tensor: Tensor) -> Tensor:
    """A layer whose channels are all gone works on one channel of zeros."""
    return tensor if tensor.numel() else tensor.new_zeros([max(1, n) for n in tensor.shape])


def _widths(state: dict[str, Tensor], model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: widths_in(state, name, model) for name in layer_widths(model)}

"""The thin model: active channels cut out as plain torch layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.ops.slot import parameter_slots

__all__ = ["Widths", "compact", "layer_widths", "shrink_", "thin_state"]

Widths = dict[str, tuple[int, int]]


def compact(model: ChannelModel) -> nn.Module:
    """Return the thin network of the current sets: the same architecture with narrow torch layers.

    Its outputs are those of the converted model. Nothing of dcx is inside: torch.export, ONNX and
    every other tool see a plain model. Weights and running statistics are copies.

    Raises:
        TypeError: if ``model`` was not made by `convert`.
    """
    if not isinstance(model, ChannelModel):
        raise TypeError(expected("a model made by convert", type(model).__name__, "compact"))
    state = thin_state(model)
    thin = model.skeleton()
    shrink_(thin, {name: _widths_in(state, name, layer) for name, layer in _layers(thin)})
    return model.fill(thin, state)


@torch.no_grad()
def thin_state(model: ChannelModel) -> dict[str, Tensor]:
    """Return the state_dict of the thin network: every entry cut to the current sets, as copies."""
    state: dict[str, Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
    for name, slot in parameter_slots(model):
        rows = slot.rows()
        if rows is not None:
            state[name] = rows.gather(slot.parameter)
    for name, active in model.active.items():
        for norm in model.groups[name].of_role("norm"):
            for vector in (f"{norm.module}.running_mean", f"{norm.module}.running_var"):
                if vector in state:
                    state[vector] = state[vector][active.to(state[vector].device).indices]
    return state


def layer_widths(model: nn.Module) -> Widths:
    """Return (in, out) widths of every conv, linear and batch norm, by module name."""
    return {name: _widths(layer) for name, layer in _layers(model)}


def shrink_(model: nn.Module, widths: Mapping[str, tuple[int, int]]) -> None:
    """Give the named layers of a dense model new widths; what they then hold is uninitialised.

    Raises:
        ValueError: on a layer that does not exist, cannot shrink, or is narrower than asked for;
            nothing is changed then.
    """
    layers = dict(_layers(model))
    for name, width in widths.items():
        if name not in layers:
            raise ValueError(expected("a conv, linear or batch norm of the model", repr(name)))
        full, fixed = _widths(layers[name]), getattr(layers[name], "groups", 1) > 1
        if any(not 0 < w <= f or (fixed and w != f) for w, f in zip(width, full, strict=True)):
            what = f"(in, out) widths {'equal' if fixed else 'up'} to {full}"
            raise ValueError(expected(what, tuple(width), name))
    for name, (width_in, width_out) in widths.items():
        _shrink_layer(layers[name], width_in, width_out)


def _shrink_layer(layer: nn.Module, width_in: int, width_out: int) -> None:
    if isinstance(layer, nn.Conv2d):
        layer.in_channels, layer.out_channels = width_in, width_out
        _narrow(layer, "weight", (width_out, width_in // layer.groups, *layer.kernel_size))
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = width_in, width_out
        _narrow(layer, "weight", (width_out, width_in))
    else:
        assert isinstance(layer, nn.BatchNorm2d)
        layer.num_features = width_out
        for vector in ("weight", "running_mean", "running_var"):
            _narrow(layer, vector, (width_out,))
    _narrow(layer, "bias", (width_out,))


def _narrow(layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    tensor = getattr(layer, name)
    if tensor is None or tuple(tensor.shape) == shape:
        return
    new = tensor.detach().new_empty(shape)
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(layer, name, nn.Parameter(new, tensor.requires_grad) if is_parameter else new)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]


def _widths(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.BatchNorm2d)
    return layer.num_features, layer.num_features


def _widths_in(state: Mapping[str, Tensor], name: str, layer: nn.Module) -> tuple[int, int]:
    """Read a layer's widths off its entries in a thin state_dict."""
    prefix = f"{name}." if name else ""
    for entry in ("weight", "running_mean"):
        tensor = state.get(prefix + entry)
        if tensor is not None and tensor.dim() == 1:
            return tensor.shape[0], tensor.shape[0]
        if tensor is not None:
            return tensor.shape[1] * getattr(layer, "groups", 1), tensor.shape[0]
    return _widths(layer)

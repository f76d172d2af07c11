"""Narrow layers: new widths for the layers of a dense model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dcx_kernels.errors import expected

__all__ = ["Widths", "layer_widths", "shrink_", "widths_in"]

Widths = dict[str, tuple[int, int]]


def layer_widths(model: nn.Module) -> Widths:
    """Return (in, out) widths of every conv, linear, batch norm and PReLU, by module name."""
    return {name: _widths(layer) for name, layer in _layers(model).items()}


def widths_in(state: Mapping[str, Tensor], name: str, model: nn.Module) -> tuple[int, int]:
    """Read a layer's widths off its entries in a thin state_dict."""
    layer = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    for entry in ("weight", "running_mean"):
        tensor = state.get(prefix + entry)
        if tensor is None:
            continue
        if tensor.dim() == 1:
            return tensor.shape[0], tensor.shape[0]
        if isinstance(layer, nn.Conv2d) and _is_depthwise(layer):
            return tensor.shape[0] * layer.in_channels // layer.out_channels, tensor.shape[0]
        return tensor.shape[1] * getattr(layer, "groups", 1), tensor.shape[0]
    return _widths(layer)


def shrink_(model: nn.Module, widths: Mapping[str, tuple[int, int]]) -> None:
    """Give the named layers of a dense model new widths; what they then hold is uninitialised.

    Raises:
        ValueError: on a layer that does not exist, cannot shrink so, or is narrower than asked for;
            nothing is changed then.
    """
    layers = _layers(model)
    for name, width in widths.items():
        if name not in layers:
            raise ValueError(expected("a conv, linear or batch norm of the model", repr(name)))
        full = _widths(layers[name])
        if any(not 0 < w <= f for w, f in zip(width, full, strict=True)):
            raise ValueError(expected(f"(in, out) widths up to {full}", tuple(width), name))
        if not _fits(layers[name], *width):
            groups = getattr(layers[name], "groups", 1)
            what = f"(in, out) widths that {groups} groups of {full} can have"
            raise ValueError(expected(what, tuple(width), name))
    for name, (width_in, width_out) in widths.items():
        _shrink_layer(layers[name], width_in, width_out)


def _fits(layer: nn.Module, width_in: int, width_out: int) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
        return True
    if _is_depthwise(layer):
        return width_out * layer.in_channels == width_in * layer.out_channels
    return width_in % layer.groups == 0 and width_out % layer.groups == 0


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _shrink_layer(layer: nn.Module, width_in: int, width_out: int) -> None:
    if isinstance(layer, nn.Conv2d):
        if _is_depthwise(layer):
            layer.groups = width_in
        layer.in_channels, layer.out_channels = width_in, width_out
        _narrow(layer, "weight", (width_out, width_in // layer.groups, *layer.kernel_size))
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = width_in, width_out
        _narrow(layer, "weight", (width_out, width_in))
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = width_out
        _narrow(layer, "weight", (width_out,))
        return
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


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.PReLU)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _widths(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters, layer.num_parameters
    assert isinstance(layer, nn.BatchNorm2d)
    return layer.num_features, layer.num_features

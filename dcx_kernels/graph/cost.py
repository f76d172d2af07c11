"""What a network costs at given widths: parameters, multiply-accumulates, activation bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.trace import trace

__all__ = ["Cost", "LayerCost", "cost"]


@dataclass(frozen=True)
class LayerCost:
    """Cost of one conv, linear or batch norm, for one sample.

    Attributes:
        name: module name.
        in_active, out_active: channels that exist (features of a linear layer).
        params: elements of weight and bias.
        macs: multiply-accumulates of one forward; 0 for a norm, as torch's FlopCounterMode counts.
        activation_bytes: size of the output.
    """

    name: str
    in_active: int
    out_active: int
    params: int
    macs: int
    activation_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of a network for one sample, layer by layer."""

    layers: tuple[LayerCost, ...]
    other_params: int = 0
    other_macs: int = 0  # attention, functional forms, what stands inside leaf modules

    @property
    def params(self) -> int:
        """Parameters in total."""
        return self.other_params + sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward (the papers say FLOPs)."""
        return self.other_macs + sum(layer.macs for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all layer outputs."""
        return sum(layer.activation_bytes for layer in self.layers)


def cost(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...] | None = None) -> Cost:
    """Count what is active in a converted model, or all of a plain one.

    Args:
        model: a `ChannelModel` (with its current sets) or any model that torch.fx can trace.
        example_inputs: needed for a plain model; only shapes are read, the batch size does not
            matter.

    Returns:
        Figures for one sample; parameters and MACs are those of the thin network.

    Raises:
        ValueError: if a plain model comes without example inputs.
    """
    if isinstance(model, ChannelModel):
        pixels, macs = model.structure.output_pixels, model.structure.macs
        widths = _active_widths(model)
    else:
        if example_inputs is None:
            what = "example_inputs with a model that was not converted"
            raise ValueError(expected(what, "None", "cost"))
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        program = trace(copy.deepcopy(model), inputs)[False]
        pixels, macs, widths = program.pixels, program.macs, {}
    layers, counted = [], 0
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.PReLU)):
            continue
        layers.append(_layer_cost(name, layer, widths.get(name, {}), pixels.get(name, 0)))
        dense = _layer_cost(name, layer, {}, pixels.get(name, 0))
        counted, macs = counted + dense.params, macs - dense.macs
    total = sum(p.numel() for p in model.parameters())
    return Cost(tuple(layers), total - counted, macs)


def _layer_cost(name: str, layer: nn.Module, sides: dict[str, int], pixels: int) -> LayerCost:
    if isinstance(layer, nn.BatchNorm2d):
        width = max(1, sides.get("out", layer.num_features))
        params = 2 * width if layer.affine else 0
        element = layer.running_mean if layer.weight is None else layer.weight
        return LayerCost(name, width, width, params, 0, width * pixels * _size(element))
    if isinstance(layer, nn.PReLU):
        width = max(1, sides.get("out", layer.num_parameters))
        return LayerCost(name, width, width, width, 0, width * pixels * _size(layer.weight))
    if isinstance(layer, nn.Conv2d):
        in_, out = sides.get("in", layer.in_channels), sides.get("out", layer.out_channels)
        in_, out = max(1, in_), max(1, out)  # a thin layer without channels works on one of zeros
        groups = in_ if layer.groups == layer.in_channels else layer.groups
        weights = out * (in_ // groups) * layer.kernel_size[0] * layer.kernel_size[1]
    else:
        assert isinstance(layer, nn.Linear)
        in_, out = sides.get("in", layer.in_features), sides.get("out", layer.out_features)
        weights = out * in_
    params = weights + (out if layer.bias is not None else 0)
    bytes_ = out * pixels * _size(layer.weight)
    return LayerCost(name, in_, out, params, weights * pixels, bytes_)


def _size(tensor: Tensor | None) -> int:
    return torch.get_default_dtype().itemsize if tensor is None else tensor.element_size()


def _active_widths(model: ChannelModel) -> dict[str, dict[str, int]]:
    widths: dict[str, dict[str, int]] = {}
    for name, axes in model.structure.axes.items():
        widths[name] = {}
        for side, layout in (("out", axes.out), ("in", axes.in_)):
            active = model.layer_sets[layout]
            if active is not None:
                widths[name][side] = len(active) * layout.inner
    return widths

"""What works on each channel alone: activations, pooling, dropout, means over pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dcx_kernels.graph.walk import Rule, Value, Walk

__all__ = ["FUNCTIONS", "METHODS", "MODULES", "per_channel"]


def per_channel(walk: Walk, node: fx.Node) -> Value:
    """Work on each channel alone: the rule of activations, pooling, dropout and their like."""
    x = node.args[0] if node.args else node.kwargs.get("input")
    layout = walk.layout(x)
    if layout is None or any(walk.value(other) for other in node.all_input_nodes if other is not x):
        return walk.unusual(node)
    return layout


def _over_pixels(walk: Walk, node: fx.Node) -> Value:
    """A reduction over dims: of pixels alone it leaves the channels as they are."""
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    layout, shape = walk.layout(node.args[0]), walk.shape(node.args[0])
    dims = [dims] if isinstance(dims, int) else dims
    known = isinstance(dims, (list, tuple)) and all(isinstance(d, int) for d in dims)
    if known and layout is not None and shape and all(d % len(shape) >= 2 for d in dims):
        return layout
    walk.keep_inputs(node, f"{walk.describe(node)} over batch or channels")
    return None


_FUNCTIONS: list[Any] = [
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.dropout, F.dropout2d,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.abs,
]  # fmt: skip
_METHODS = [
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "abs", "clone",
    "detach", "float", "half", "double", "to", "hardtanh_",
]  # fmt: skip
_MODULES: list[type] = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.LogSigmoid,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
    nn.CircularPad2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
]  # fmt: skip

MODULES: dict[type, Rule] = dict.fromkeys(_MODULES, per_channel)
FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(_FUNCTIONS, per_channel),
    torch.mean: _over_pixels,
    torch.sum: _over_pixels,
    torch.amax: _over_pixels,
    torch._C._nn.gelu: per_channel,
    torch._C._nn.avg_pool2d: per_channel,
}
METHODS: dict[str, Rule] = {
    **dict.fromkeys(_METHODS, per_channel),
    "mean": _over_pixels,
    "sum": _over_pixels,
    "amax": _over_pixels,
}

"""What training has made, carried between a converted model and the thin network cut from it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dcx_kernels.errors import expected
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.ops.slot import SliceRows, parameter_slots
from dcx_kernels.optim import SGD, AdamW

__all__ = ["compact_optimizer", "refill"]

_TORCH: dict[type[Optimizer], type[Optimizer]] = {
    SGD: torch.optim.SGD,
    torch.optim.SGD: torch.optim.SGD,
    AdamW: torch.optim.AdamW,
    torch.optim.AdamW: torch.optim.AdamW,
}


@torch.no_grad()
def compact_optimizer(optimizer: Optimizer, model: ChannelModel, thin: nn.Module) -> Optimizer:
    """Return an optimizer that goes on training a thin network where the converted one stopped.

    Its param groups and hyper-parameters are the old one's; its state is the active slice of the
    old one's, as a copy. While the channels stay as they are, the thin network then takes the very
    steps that the converted one would take. Call it right after `compact`: with other channels
    active the slices would be others. A learning-rate schedule is bound to its optimizer and has to
    be made anew (``initial_lr`` is there, for its ``last_epoch``).

    Args:
        optimizer: SGD or AdamW, of `dcx_kernels.optim` or of torch, over parameters of ``model``.
        model: the converted model, either execution, with the channels that ``thin`` has.
        thin: what `compact` made of it.

    Returns:
        `torch.optim.SGD` or `torch.optim.AdamW`.

    Raises:
        TypeError: on any other optimizer or model; subclasses too: their step is not known.
        ValueError: on an optimizer of another model, or a thin network of other widths.
    """
    kind = _TORCH.get(type(optimizer))
    if kind is None:
        what = "an SGD or AdamW of dcx_kernels.optim or torch.optim"
        raise TypeError(expected(what, type(optimizer).__name__, "compact_optimizer"))
    pairs = _pairs(model, thin, "compact_optimizer")
    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Any]] = {}
    # the state_dict numbers parameters only; param_groups may show packed leaves behind them
    numbered = optimizer.state_dict()["param_groups"]
    for group, numbers in zip(optimizer.param_groups, numbered, strict=True):
        params = []
        for number, parameter in zip(numbers["params"], group["params"], strict=False):
            if parameter not in pairs:
                what = f"parameters of this {len(pairs)}-parameter model in the optimizer"
                got = f"another one of shape {tuple(parameter.shape)}"
                raise ValueError(expected(what, got, "compact_optimizer"))
            narrow, rows = pairs[parameter]
            params.append(narrow)
            old = optimizer.state.get(parameter, {})
            if old:
                state[number] = {k: _cut(v, parameter, narrow, rows) for k, v in old.items()}
        settings = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        groups.append({"params": params, **settings})
    accepted = inspect.signature(kind).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    new = kind(groups, **copy.deepcopy(defaults))
    # not new.state[...]: torch decides here where a fused or capturable step count must lie
    new.load_state_dict({"state": state, "param_groups": new.state_dict()["param_groups"]})
    return new


@torch.no_grad()
def refill(model: ChannelModel, thin: nn.Module) -> None:
    """Put a thin network's weights and running statistics back where they were cut from.

    So training that went on with the thin network is not lost to the converted model. Its inactive
    channels are left alone; its active ones must be those that ``thin`` has.

    Raises:
        TypeError: if ``model`` was not made by `convert`, or ``thin`` is no plain network.
        ValueError: on a thin network of other widths; nothing is changed then.
    """
    pairs = _pairs(model, thin, "refill")
    buffers = dict(thin.named_buffers(remove_duplicate=False))
    for name, _ in model.named_buffers():
        if name not in buffers:
            raise ValueError(expected(f"the thin network to have a buffer {name}", "none"))
    for parameter, (narrow, rows) in pairs.items():
        new = narrow.detach().to(parameter.device, parameter.dtype)
        if rows is not None:
            if 0 in rows.shape:  # the thin layer reads a channel of zeros in place of none
                continue
            full = parameter.detach().clone(memory_format=torch.contiguous_format)
            rows.scatter_(full, new.contiguous())
            new = full
        parameter.copy_(new)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        axes = model.structure.axes.get(owner)
        statistic = leaf in ("running_mean", "running_var")
        active = model.layer_sets[axes.out] if axes is not None and statistic else None
        new = buffers[name].detach().to(buffer.device, buffer.dtype)
        if active is None:
            buffer.copy_(new)
        else:
            buffer[active.to(buffer.device).indices] = new


def _pairs(
    model: ChannelModel, thin: nn.Module, where: str
) -> dict[Tensor, tuple[Tensor, SliceRows | None]]:
    """Return each parameter's counterpart in the thin network, and which slice of it that is."""
    if not isinstance(model, ChannelModel):
        raise TypeError(expected("a model made by convert", type(model).__name__, where))
    if isinstance(thin, ChannelModel) or not isinstance(thin, nn.Module):
        raise TypeError(expected("a thin network made by compact", type(thin).__name__, where))
    slices = {slot.parameter: slot.rows() for _, slot in parameter_slots(model)}
    narrow = dict(thin.named_parameters(remove_duplicate=False))
    pairs: dict[Tensor, tuple[Tensor, SliceRows | None]] = {}
    for name, parameter in model.named_parameters():
        rows = slices.get(parameter)
        shape = _thin_shape(parameter, rows)
        got = tuple(narrow[name].shape) if name in narrow else "no such parameter"
        if got != shape:
            what = f"{name} of shape {shape} in the thin network, as the model's channels are"
            raise ValueError(expected(what, got, where))
        pairs[parameter] = narrow[name], rows
    return pairs


def _thin_shape(parameter: Tensor, rows: SliceRows | None) -> tuple[int, ...]:
    shape = tuple(parameter.shape if rows is None else rows.shape)
    return (shape[0], 1, *shape[2:]) if 0 in shape else shape


def _cut(value: Any, parameter: Tensor, narrow: Tensor, rows: SliceRows | None) -> Any:
    """Return the active slice of a state tensor, laid out as the thin parameter."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.shape != parameter.shape or value.dim() == 0:
        return value.clone()  # a step count
    # fused kernels go through memory: the strides must be the parameter's
    new = torch.zeros_like(narrow, dtype=value.dtype)
    if rows is None:
        new.copy_(value)
    elif 0 not in rows.shape:
        new.copy_(rows.gather(value))
    return new

"""``dcx inspect``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.cli.console import make_console
from dcx_kernels.cli.plot import plot_widths
from dcx_kernels.cli.tables import cost_table, group_table, kept_table
from dcx_kernels.errors import expected
from dcx_kernels.graph import ChannelGroup, convert, cost
from dcx_kernels.recipes.networks import build_network, check_runs

__all__ = ["inspect"]


def inspect(
    *,
    model: str,
    width: float,
    density: float,
    seed: int,
    residual: Any,
    grouped: Any,
    leaf_module: Sequence[str],
    classes: int,
    image_size: int,
    plot: Path | None,
) -> int:
    """Print a network's channel groups, and what each layer costs at a density.

    Args:
        model: name of the network, see `build_network`.
        width: factor on its channels.
        density: share of the channels of each selectable group that is active, drawn at random.
        seed: of that draw.
        residual: see `dcx_kernels.convert`.
        grouped: likewise.
        leaf_module: qualified names of module classes that are kept whole.
        classes: outputs.
        image_size: height and width of the input.
        plot: picture to write.
    """
    if not 0 < density <= 1:
        raise ValueError(expected("a density in (0, 1]", density))
    if image_size < 1:
        raise ValueError(expected("a positive --image-size", image_size))
    dense = build_network(model, classes, width)
    _check_leaves(dense, leaf_module)
    example = torch.zeros(1, 3, image_size, image_size)
    check_runs(dense, example, model)
    converted = convert(dense, example, residual, grouped=grouped, leaf_modules=tuple(leaf_module))
    full = cost(converted)
    converted.set_active(_draw(converted.groups, density, seed))
    active = cost(converted)
    name = model if width == 1 else f"{model} x {width:g}"
    policy = f"residual {residual}, grouped {grouped}"
    chosen = "all channels"
    if density < 1:
        chosen = f"density {density:g}: the same share of every group, random channels, seed {seed}"
    console = make_console()
    console.print(group_table(converted.groups, converted.active, f"{name}, {policy}"))
    if any(not group.selectable for group in converted.groups.values()):
        console.print(kept_table(converted.groups))
    title = f"cost of one image of {image_size}x{image_size}, {chosen}"
    console.print(cost_table(active, full, title))
    if plot is not None:
        plot_widths(active, full, f"{name}, {policy}\n{chosen}", plot)
        console.print(f"{plot}: widths and MACs of every layer", highlight=False)
    return 0


def _draw(groups: Mapping[str, ChannelGroup], density: float, seed: int) -> dict[str, ChannelSet]:
    """Draw the same share of every selectable group, as many from each of its runs.

    Random ones, because the first channels of two groups coincide: a union of them would look
    smaller than any that training finds.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = {}
    for name, group in groups.items():
        if group.selectable:
            run = group.num_channels // group.runs
            kept = max(1, int(density * run + 1e-9))
            order = torch.rand(group.runs, run, generator=generator).argsort(1)[:, :kept]
            chosen = order + run * torch.arange(group.runs)[:, None]
            sets[name] = ChannelSet(chosen.flatten().sort().values, group.num_channels)
    return sets


def _check_leaves(network: nn.Module, names: Sequence[str]) -> None:
    """Refuse names of classes that the network has no module of: they would do nothing."""
    kinds = {kind for module in network.modules() for kind in type(module).__mro__}
    known = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    for name in names:
        if name not in known:
            short = {n.rpartition(".")[2]: n for n in known}
            near = difflib.get_close_matches(name.rpartition(".")[2], short, n=5, cutoff=0.5)
            hint = f"; near: {', '.join(short[n] for n in near)}" if near else ""
            what = "--leaf-module to name the class of a module in the network"
            raise ValueError(expected(what, repr(name) + hint))

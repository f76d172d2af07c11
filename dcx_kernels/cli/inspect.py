"""``dcx inspect``."""

from __future__ import annotations

import torch
from rich.table import Table

from dcx_kernels.cli.console import make_console
from dcx_kernels.errors import expected
from dcx_kernels.graph import ChannelModel, convert, cost
from dcx_kernels.models import build
from dcx_kernels.recipes.dce import first_channels
from dcx_kernels.train.table import count, size

__all__ = ["inspect"]


def inspect(*, model: str, width: float, density: float, classes: int, image_size: int) -> int:
    """Print a network's channel groups, and what each layer costs at a density.

    Args:
        model: name of the network.
        width: factor on its channels.
        density: share of the channels of each selectable group that is active.
        classes: outputs.
        image_size: height and width of the input.
    """
    if not 0 < density <= 1:
        raise ValueError(expected("a density in (0, 1]", density))
    if image_size < 1:
        raise ValueError(expected("a positive --image-size", image_size))
    dense = build(model, classes, width=width)
    example = torch.zeros(1, 3, image_size, image_size)
    try:
        with torch.no_grad():
            dense.eval()(example)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        size = f"{image_size}x{image_size}"
        raise ValueError(f"{model} does not run on images of {size}: {reason}") from error
    converted = convert(dense, example)
    full = cost(converted).macs
    converted.set_active(first_channels(converted.groups, density))
    console = make_console()
    console.print(_groups(converted, f"{model} x {width:g}: channel groups"))
    console.print(_layers(converted, f"cost of one image at density {density:g}", full))
    return 0


def _groups(model: ChannelModel, title: str) -> Table:
    table = Table(title=title)
    table.add_column("group", no_wrap=True)
    table.add_column("channels", justify="right")
    table.add_column("active", justify="right")
    table.add_column("selectable")
    table.add_column("why not")
    for name, group in model.groups.items():
        active = len(model.active[name]) if name in model.active else group.num_channels
        selectable = "yes" if group.selectable else "no"
        reason = group.reason or ""
        table.add_row(name, str(group.num_channels), str(active), selectable, reason)
    return table


def _layers(model: ChannelModel, title: str, full: int) -> Table:
    price = cost(model)
    table = Table(title=title)
    table.add_column("layer", no_wrap=True)
    for column in ("in", "out", "parameters", "MACs", "activations"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in price.layers:
        table.add_row(
            row.name,
            str(row.in_active),
            str(row.out_active),
            count(row.params),
            count(row.macs),
            size(row.activation_bytes),
        )
    table.add_section()
    share = f"{count(price.macs)} ({100 * price.macs / max(1, full):.0f} %)"
    table.add_row("total", "", "", count(price.params), share, size(price.activation_bytes))
    return table

"""Tables of channel groups and of costs, what is active beside what there is."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.bar import Bar
from rich.table import Table

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph import ChannelGroup, Cost

__all__ = ["cost_table", "group_table", "kept_table"]

_BAR = 10
_CHANNELS = ((1, ""),)
_COUNTS = ((10**9, " G"), (10**6, " M"), (10**3, " k"), (1, ""))
_BYTES = ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B"))


def group_table(
    groups: Mapping[str, ChannelGroup], active: Mapping[str, ChannelSet], title: str
) -> Table:
    """List the groups whose channels may be switched off."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("selectable group", overflow="fold")
    for column in ("channels", "active", "layers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", width=_BAR)
    for name, group in groups.items():
        if group.selectable:
            runs = f" ({group.runs} runs)" if group.runs > 1 else ""
            kept, layers = len(active[name]), len({member.module for member in group.members})
            bar = Bar(group.num_channels, 0, kept, width=_BAR)
            table.add_row(name, f"{group.num_channels}{runs}", str(kept), str(layers), bar)
    return table


def kept_table(groups: Mapping[str, ChannelGroup]) -> Table:
    """List the groups that stay full-width, and why."""
    table = Table(title="groups kept full", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for name, group in groups.items():
        if not group.selectable:
            table.add_row(name, str(group.num_channels), group.reason)
    return table


def cost_table(active: Cost, full: Cost, title: str) -> Table:
    """List widths and cost of every layer, active/all, and the totals.

    Args:
        active: of what is active.
        full: of the dense network; the same layers in the same order.
        title: above the table.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold", min_width=12)
    for column in ("in", "out"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", width=_BAR)
    for column in ("parameters", "MACs", "activations"):
        table.add_column(column, justify="right", no_wrap=True)
    for thin, dense in zip(active.layers, full.layers, strict=True):
        table.add_row(
            thin.name,
            _of(thin.in_active, dense.in_active, _CHANNELS),
            _of(thin.out_active, dense.out_active, _CHANNELS),
            Bar(max(1, dense.out_active), 0, thin.out_active, width=_BAR),
            _of(thin.params, dense.params, _COUNTS),
            _of(thin.macs, dense.macs, _COUNTS),
            _of(thin.activation_bytes, dense.activation_bytes, _BYTES),
        )
    if full.other_params:
        table.add_row("other", "", "", "", _of(active.other_params, full.other_params, _COUNTS))
    table.add_section()
    sums = (
        (active.params, full.params, _COUNTS),
        (active.macs, full.macs, _COUNTS),
        (active.activation_bytes, full.activation_bytes, _BYTES),
    )
    table.add_row("total", "", "", "", *(_of(*figures) for figures in sums), style="bold")
    shares = (f"{100 * part / max(1, whole):.1f} %" for part, whole, _ in sums)
    table.add_row("share", "", "", "", *shares, style="bold")
    return table


def _of(part: int, whole: int, units: tuple[tuple[int, str], ...]) -> str:
    """Write both in the unit that suits the whole: 3100000 of 23530000 is "3.10/23.53 M"."""
    factor, unit = next((u for u in units if whole >= u[0]), units[-1])
    number = "{:.0f}" if factor == 1 else "{:.2f}"
    texts = [number.format(value / factor) for value in (part, whole)]
    return (texts[1] if part == whole else "/".join(texts)) + unit

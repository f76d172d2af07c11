"""Results of a GPU run as tables that fit a terminal: ratios first, then what is behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rows import GpuOpRow, GpuStepRow

__all__ = ["geometric_mean", "print_op_tables", "print_step_table"]

CONVS = ("conv_fwd", "conv_dgrad", "conv_wgrad")
_WIDTH = 150

Key = tuple[str, str, float, str]


def print_op_tables(rows: Sequence[GpuOpRow]) -> None:
    """Print what convolutions take compared with cuDNN, and what the rest reaches of a copy."""
    console = Console(width=_WIDTH)
    if rows:
        console.print(_key(rows[0]), soft_wrap=True)
        row = rows[0]
        console.print(
            f"ceilings: copy {row.copy_gb_per_s:.0f} GB/s,"
            f" {row.dtype} matrix product {row.matmul_tflop_per_s:.0f} TFLOP/s"
        )
    console.print(_means(rows))
    console.print(_convolutions(rows))
    console.print(_others(rows))


def print_step_table(rows: Sequence[GpuStepRow]) -> None:
    """Print the times and ratios of training steps."""
    console = Console(width=_WIDTH)
    if rows:
        console.print(_key(rows[0]), soft_wrap=True)
    table = _table("Training step: median of the device in ms, and ratios")
    for column in ("network", "batch", "d", "widths", "regime"):
        table.add_column(column)
    numbers = ("dense", "mask", "thin", "compiled", "arm", "ms", "p99")
    ratios = ("/thin", "mask/", "host/thin", "peak/thin", "saved/thin")
    for column in (*numbers, *ratios):
        table.add_column(column, justify="right")
    blocks: dict[tuple[object, ...], list[GpuStepRow]] = {}
    for row in rows:
        blocks.setdefault((row.model, row.batch, row.density, row.widths), []).append(row)
    for (model, batch, density, widths), block in blocks.items():
        times = {(row.arm, row.regime): row.step_ms for row in block}
        for row in block:
            if not row.arm.startswith("sparse"):
                continue
            plain = [times.get((arm, "any")) for arm in ("dense", "mask")]
            plain += [times.get((arm, row.regime)) for arm in ("thin", "compiled")]
            table.add_row(
                str(model), str(batch), f"{density:g}", str(widths), row.regime,
                *(_number(value, ".2f") for value in plain),
                row.arm, f"{row.step_ms:.2f}", f"{row.step_p99_ms:.2f}",
                *(_number(value, ".2f") for value in (
                    row.sparse_over_thin, row.mask_over_sparse, row.host_over_thin,
                    row.peak_over_thin, row.saved_over_thin,
                )),
            )  # fmt: skip
    console.print(table)


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, or None of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def _means(rows: Sequence[GpuOpRow]) -> Table:
    """One line per density and kind of width: geometric means over the layers."""
    table = _table("Convolutions: time over that of torch on the same compact tensors (geo. mean)")
    for column in ("d", "widths", "layers"):
        table.add_column(column)
    arms = ("own", "library", "mask")
    for op in CONVS:
        for arm in arms:
            table.add_column(f"{op.removeprefix('conv_')} {arm}", justify="right")
    convolutions = [row for row in rows if row.op in CONVS]
    for density, widths in dict.fromkeys((row.density, row.widths) for row in convolutions):
        here = [row for row in convolutions if (row.density, row.widths) == (density, widths)]
        means = [
            geometric_mean(
                row.over_torch
                for row in here
                if row.op == op and row.arm == arm and row.over_torch is not None
            )
            for op in CONVS
            for arm in arms
        ]
        layers = len({row.layer for row in here})
        table.add_row(
            f"{density:g}", widths, str(layers), *(_number(mean, ".2f") for mean in means)
        )
    return table


def _convolutions(rows: Sequence[GpuOpRow]) -> Table:
    """One line per layer, all channels and half of them."""
    table = _table("Our convolution kernels, layer by layer: us (over torch, % of the roofline)")
    table.add_column("layer")
    by: dict[Key, GpuOpRow] = {
        (row.layer, row.op, row.density, row.widths): row
        for row in rows
        if row.arm == "own" and row.op in CONVS
    }
    shown = ((1.0, "full"), (0.5, "aligned"))
    for density, _widths in shown:
        for op in CONVS:
            table.add_column(f"{op.removeprefix('conv_')} {density:g}", justify="right")
    for layer in dict.fromkeys(key[0] for key in by):
        cells = []
        for density, widths in shown:
            for op in CONVS:
                row = by.get((layer, op, density, widths))
                cells.append("-" if row is None else _cell(row))
        table.add_row(layer, *cells)
    return table


def _others(rows: Sequence[GpuOpRow]) -> Table:
    table = _table("Other operators: ours")
    for column in ("operator", "layer", "d", "widths"):
        table.add_column(column)
    for column in ("us", "over torch", "GB/s", "% of copy", "host us"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.op in CONVS or row.arm != "own":
            continue
        share = None if row.gb_per_s is None else 100 * row.gb_per_s / row.copy_gb_per_s
        table.add_row(
            row.op, row.layer, f"{row.density:g}", row.widths, f"{row.median_us:.1f}",
            _number(row.over_torch, ".2f"), _number(row.gb_per_s, ".0f"),
            _number(share, ".0f"), f"{row.host_us:.0f}",
        )  # fmt: skip
    return table


def _cell(row: GpuOpRow) -> str:
    share = 0.0 if row.roofline is None else 100 * row.roofline
    return f"{row.median_us:.0f} ({_number(row.over_torch, '.2f')}, {share:.0f})"


def _key(row: GpuOpRow | GpuStepRow) -> str:
    state = " + changes" if row.dirty else ""
    return (
        f"{row.gpu}, driver {row.driver}, CUDA {row.cuda}, torch {row.torch}, triton {row.triton},"
        f" dcx_kernels {row.dcx_kernels} ({row.commit}{state}), {row.dtype} {row.layout},"
        f" {row.date}"
    )


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

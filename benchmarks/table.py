"""Results as tables: times and ratios, and where the difference to thin goes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.harness import PHASES
from benchmarks.rows import StepRow

__all__ = ["phase_shares", "print_tables"]

Block = dict[tuple[str, str], StepRow]


def print_tables(rows: Sequence[StepRow]) -> None:
    """Print both tables."""
    console = Console()
    if not console.is_terminal:  # a log file is not 80 columns wide
        console = Console(width=170)
    if rows:
        console.print(_key(rows[0]))
    console.print(_times(rows))
    console.print(_accounting(rows))


def phase_shares(sparse: StepRow, thin: StepRow) -> dict[str, float]:
    """Return what each phase of sparse costs more than in thin, in percent of the thin step.

    ``rest`` is what the medians of the phases miss of the median of the step.
    """
    shares = {
        phase: 100 * (getattr(sparse, f"{phase}_ms") - getattr(thin, f"{phase}_ms")) / thin.step_ms
        for phase in PHASES
    }
    total = 100 * (sparse.step_ms / thin.step_ms - 1)
    return {**shares, "rest": total - sum(shares.values()), "total": total}


def _key(row: StepRow) -> str:
    state = " + changes" if row.dirty else ""
    return (
        f"{row.cpu}, {row.cores} cores, {row.threads} threads, {row.instructions} | {row.system},"
        f" python {row.python}, torch {row.torch}, dcx_kernels {row.dcx_kernels}"
        f" ({row.commit}{state}) | {row.dtype}, batch {row.batch} | {row.date}"
    )


def _blocks(rows: Sequence[StepRow]) -> dict[tuple[str, str, float], Block]:
    blocks: dict[tuple[str, str, float], Block] = {}
    for row in rows:
        blocks.setdefault((row.model, row.layout, row.density), {})[row.arm, row.regime] = row
    return blocks


def _times(rows: Sequence[StepRow]) -> Table:
    table = Table(title="Step time: median (p99) in ms, and ratios")
    for column in ("network", "layout", "density", "regime"):
        table.add_column(column)
    columns = ("dense", "mask", "thin", "sparse", "sparse/thin", "mask/sparse", "dense/sparse")
    for column in (*columns, "against fixed", "saved/thin", "activations", "off grid"):
        table.add_column(column, justify="right")
    for (model, layout, density), block in _blocks(rows).items():
        for regime in ("fixed", "varying"):
            sparse, thin = block.get(("sparse", regime)), block.get(("thin", regime))
            if sparse is None and thin is None:
                continue
            off_grid = sparse or thin
            assert off_grid is not None
            table.add_row(
                model, layout, f"{density:g}", regime,
                _ms(block.get(("dense", "any"))), _ms(block.get(("mask", "any"))),
                _ms(thin), _ms(sparse),
                *(_number(sparse, name) for name in (
                    "sparse_over_thin", "mask_over_sparse", "dense_over_sparse",
                    "varying_over_fixed", "saved_over_thin", "saved_activations_over_thin",
                )),
                f"{off_grid.off_grid}/{off_grid.groups}",
            )  # fmt: skip
    return table


def _accounting(rows: Sequence[StepRow]) -> Table:
    table = Table(title="Sparse minus thin, in percent of the thin step")
    for column in ("network", "layout", "density", "regime"):
        table.add_column(column)
    for column in (*PHASES, "rest", "total"):
        table.add_column(column, justify="right")
    for (model, layout, density), block in _blocks(rows).items():
        for regime in ("fixed", "varying"):
            sparse, thin = block.get(("sparse", regime)), block.get(("thin", regime))
            if sparse is not None and thin is not None:
                shares = phase_shares(sparse, thin)
                values = (f"{share:+.1f}" for share in shares.values())
                table.add_row(model, layout, f"{density:g}", regime, *values)
    return table


def _ms(row: StepRow | None) -> str:
    return "-" if row is None else f"{row.step_ms:.1f} ({row.step_p99_ms:.1f})"


def _number(row: StepRow | None, name: str) -> str:
    value = None if row is None else getattr(row, name)
    return "-" if value is None else f"{value:.3f}"

"""The native library's operators on this CPU, against the reference and against dense execution.

``python -m benchmarks.native_ops``: medians of interleaved rounds. What is wrong is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.environment import ROOT, current_environment
from benchmarks.native_cases import Case, cases
from benchmarks.rows import NativeRow, RowWriter

__all__ = ["main", "measure"]

_TOLERANCE = 1e-4  # against nonsense; the tests compare properly
_WARM = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the rows, print geometric means over the layers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native_ops", description=__doc__)
    parser.add_argument("--only", default="", help="operators whose name holds this")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/native_cpu.csv")
    o = parser.parse_args(argv)
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    environment = asdict(current_environment())
    rows = []
    with RowWriter(o.out, NativeRow) as writer:
        for case in track(cases(), "Measuring", transient=True):
            if o.only in case.op:
                rows.append(NativeRow(**environment, **measure(case, o.rounds)))
                writer.write(rows[-1])
    Console().print(_table(rows))


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Return the columns of a case: medians in microseconds.

    Raises:
        AssertionError: if native and reference disagree.
    """
    if case.alike:
        for found, wanted in zip(
            _tensors(case, "native"), _tensors(case, "reference"), strict=True
        ):
            error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
            assert error < _TOLERANCE, f"{case.op}, {case.case}: relative error {error:.1e}"
    times: dict[str, list[float]] = {arm: [] for arm in case.arms}
    for _ in range(_WARM + rounds):
        for arm, call in case.arms.items():
            start = time.perf_counter()
            call()
            times[arm].append((time.perf_counter() - start) * 1e6)
    us = {arm: statistics.median(taken[_WARM:]) for arm, taken in times.items()}
    return {
        "op": case.op, "case": case.case, "layout": case.layout, "batch": case.batch,
        "rounds": rounds, "dense_us": us.get("dense"), "reference_us": us["reference"],
        "native_us": us["native"], "reference_over_native": us["reference"] / us["native"],
        "dense_over_native": us["dense"] / us["native"] if "dense" in us else None,
    }  # fmt: skip


def _tensors(case: Case, arm: str) -> list[Tensor]:
    result = case.arms[arm]()
    results: Iterable[object] = [result] if isinstance(result, Tensor) else result  # type: ignore[assignment]
    return [each.clone() for each in results if isinstance(each, Tensor)]


def _table(rows: Sequence[NativeRow]) -> Table:
    table = Table(title="times of the native library: geometric means over layers")
    for name in ("operator", "layout", "batch", "layers", "reference / native", "dense / native"):
        table.add_column(name, justify="left" if name in ("operator", "layout") else "right")
    for (op, layout, batch), group in itertools.groupby(sorted(rows, key=_kind), key=_kind):
        members = list(group)
        ratios = [
            [value for row in members if (value := getattr(row, name)) is not None]
            for name in ("reference_over_native", "dense_over_native")
        ]
        means = (f"{math.exp(statistics.fmean(map(math.log, r))):.2f}" if r else "" for r in ratios)
        table.add_row(op, layout, str(batch or ""), str(len(members)), *means)
    return table


def _kind(row: NativeRow) -> tuple[str, str, int]:
    return row.op, row.layout, row.batch


if __name__ == "__main__":
    main()

"""The lines of a reproduced table: paper and ours side by side, mean and deviation over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dcx_kernels.recipes.reproduce import Reproduction
from dcx_kernels.recipes.reproduce_target import Entry
from dcx_kernels.recipes.reproduce_times import seconds_to
from dcx_kernels.recipes.reproduce_work import short_name

__all__ = [
    "METRICS",
    "Cell",
    "Metric",
    "cells_of",
    "least_macs",
    "our_text",
    "published",
    "runs_csv",
    "table_csv",
    "title_of",
]

Row = Mapping[str, Any]
_NOT_IN_CSV = {"skipping", "curve"}  # drawn, and in results.jsonl: too many numbers for a cell


@dataclass(frozen=True)
class Metric:
    """A column.

    Args:
        label: its head, with the unit.
        of: reads it from the row of a training and that of its reference, if there is one; None if
            it is not there. ``reach`` of the target is in the row as a fraction.
        text: how it is written.
        scale: a published number divided by this has the unit of the label.
        varies: whether its deviation over the seeds is worth a place in the printed table.
    """

    label: str
    of: Callable[[Row, Row | None], float | None]
    text: str = "{:.2f}"
    scale: float = 1.0
    varies: bool = False

    def written(self, value: float | None) -> str:
        """Return a value as text; "-" if there is none."""
        return "-" if value is None else self.text.format(value)


@dataclass(frozen=True)
class Cell:
    """One number, published and ours.

    Args:
        paper: as published; None if it is not.
        mean: over the seeds; None without one.
        deviation: sample standard deviation; None with less than two seeds.
        count: seeds.
    """

    paper: float | None
    mean: float | None
    deviation: float | None
    count: int


def _change(row: Row, reference: Row | None) -> float | None:
    return None if reference is None else 100 * (row["accuracy"] - reference["accuracy"])


def _faster(row: Row, reference: Row | None) -> float | None:
    """Return how many of its training steps fit into one of the reference."""
    if reference is None or not row.get("step_ms") or not reference.get("step_ms"):
        return None
    return float(reference["step_ms"] / row["step_ms"])


def _entry(name: str, scale: float = 1.0) -> Callable[[Row, Row | None], float | None]:
    def read(row: Row, reference: Row | None) -> float | None:
        value = row.get(name)
        return None if value is None else value / scale

    return read


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy %", lambda row, _: 100 * row["accuracy"], varies=True),
    "change": Metric("change", _change, "{:+.2f}", varies=True),
    "params": Metric("params, M", _entry("params", 1e6), "{:.3f}", 1e6),
    "macs": Metric("MACs, M", _entry("macs", 1e6), "{:.2f}", 1e6),
    "pruned": Metric("pruned %", lambda r, _: 100 * (1 - r["macs"] / r["dense_macs"]), "{:.1f}"),
    "saving": Metric("saved, x", lambda row, _: row["dense_macs"] / row["macs"]),
    "step_ms": Metric("step, ms", _entry("step_ms"), "{:.1f}", varies=True),
    "train_s": Metric("training, s", _entry("train_s"), "{:.0f}", varies=True),
    "faster": Metric("faster, x", _faster, varies=True),
    "reach_s": Metric("to reach, s", lambda r, _: seconds_to(r, r["reach"]), "{:.0f}", varies=True),
    "gate_macs": Metric("gates, M", _entry("gate_macs", 1e6), "{:.3f}"),
    "weight_mb": Metric("weights, MB", _entry("weight_bytes", 1e6)),
    "activation_mb": Metric("activ., MB", _entry("activation_bytes", 1e6)),
    "peak_mb": Metric("peak, MB", _entry("peak_bytes", 1e6)),
    "peak_128_gb": Metric("of 128, GB", _entry("peak_128_bytes", 1e9)),
}


def cells_of(found: Reproduction, entry: Entry) -> dict[str, Cell]:
    """Return the numbers of a line by metric.

    A change is of trainings with the same seed, and its deviation that of the differences.
    """
    target = found.target
    reach = None if target.reach is None else target.reach / 100
    rows = [{**row, "reach": reach} for row in found.rows.get(entry, [])]
    references = _references(found, entry)
    cells = {}
    for name in target.metrics:
        metric, paper = METRICS[name], entry.paper.get(name)
        own = entry.variant == target.reference
        read = (metric.of(r, None if own else references.get(r["seed"])) for r in rows)
        values = [value for value in read if value is not None]
        cells[name] = Cell(
            paper=None if paper is None else paper / metric.scale,
            mean=mean(values) if values else None,
            deviation=stdev(values) if len(values) > 1 else None,
            count=len(values),
        )
    return cells


def our_text(metric: Metric, cell: Cell) -> str:
    """Return our mean, with its deviation if that is worth a place."""
    text = metric.written(cell.mean)
    if cell.deviation is None or not metric.varies:
        return text
    return f"{text} \u00b1{metric.text.format(cell.deviation).lstrip('+')}"


def published(found: Reproduction) -> set[str]:
    """Return the metrics the paper has numbers for; a column of none would say nothing."""
    return {name for entry in found.target.entries for name in entry.paper}


def least_macs(found: Reproduction) -> dict[tuple[str, str, str], Entry | None]:
    """Return the line of the fewest MACs that reaches `Target.reach`, of each way of training.

    Returns:
        data, network and variant -> the line; None if none is that accurate. Nothing if the target
        names no accuracy or counts no MACs; ordinary networks are left out.
    """
    target = found.target
    if target.reach is None or "macs" not in target.metrics:
        return {}
    best: dict[tuple[str, str, str], tuple[float, Entry] | None] = {}
    for entry in found.rows:
        if target.is_dense(entry):
            continue
        cells, key = cells_of(found, entry), (entry.data, entry.model, entry.variant)
        accuracy, macs, before = cells["accuracy"].mean, cells["macs"].mean, best.get(key)
        best.setdefault(key, None)
        if accuracy is None or macs is None or accuracy < target.reach:
            continue
        if before is None or macs < before[0]:
            best[key] = (macs, entry)
    return {key: None if line is None else line[1] for key, line in best.items()}


def _references(found: Reproduction, entry: Entry) -> dict[int, Row]:
    """Return what a line is compared with by seed: the same density, or the ordinary network."""
    target = found.target
    for other, rows in found.rows.items():
        same = (other.data, other.model) == (entry.data, entry.model)
        dense = target.is_dense(other) or other.density == entry.density
        if same and dense and other.variant == target.reference:
            return {row["seed"]: row for row in rows}
    return {}


def title_of(found: Reproduction) -> str:
    """Return the title of table and figure; it says if the trainings are less than the paper's."""
    sources = ", ".join(
        f"{name} from {short_name(source)}" for name, source in found.sources.items()
    )
    scale = "; ".join(found.scaled)
    unscaled = "the paper's recipe" if found.target.source else "a study of its own"
    how = f"SCALED DOWN: {scale}" if scale else unscaled
    return f"{found.target.title}\n{how}; data: {sources}"


def table_csv(found: Reproduction) -> str:
    """Return the table as CSV: a line of it a row, paper and ours side by side."""
    metrics = found.target.metrics
    head = ["target", "data", "model", "variant", "density", "seeds", "scaled"]
    for name in metrics:
        label = METRICS[name].label
        head += [f"{label} (paper)", label, f"{label} (deviation)"]
    lines: list[list[Any]] = [head]
    for entry in found.target.entries:
        seeds = [row["seed"] for row in found.rows.get(entry, [])]
        line = [found.target.name, entry.data, entry.model, entry.variant, entry.density]
        line += [" ".join(map(str, seeds)), "; ".join(found.scaled)]
        for cell in cells_of(found, entry).values():
            line += [cell.paper, cell.mean, cell.deviation]
        lines.append(line)
    return _csv(lines)


def runs_csv(found: Reproduction) -> str:
    """Return every training as CSV: config, commit, seed, machine, wall time and what it gave."""
    rows = [(entry, row) for entry, rows in found.rows.items() for row in rows]
    names = [n for n in dict.fromkeys(n for _, row in rows for n in row) if n not in _NOT_IN_CSV]
    lines: list[list[object]] = [[*names]]
    for entry, row in rows:
        # a training that another target did first carries the name of the line there
        row = {**row, "variant": entry.variant}
        lines.append([_plain(row.get(name)) for name in names])
    return _csv(lines)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(str(_plain(part)) for part in value)
    return value


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()

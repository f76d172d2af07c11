"""A reproduced table as Markdown: what, how, every line, and who measured it on what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dcx_kernels.recipes.reproduce import Reproduction
from dcx_kernels.recipes.reproduce_table import METRICS, cells_of, our_text, published, title_of
from dcx_kernels.recipes.reproduce_target import Entry

__all__ = ["table_markdown"]


def table_markdown(found: Reproduction, figures: Sequence[str] = ()) -> str:
    """Return title, table, notes and origin, to be read or pasted.

    Args:
        found: the trainings.
        figures: file names of pictures beside it, which are shown below the table.
    """
    title, how = title_of(found).split("\n", 1)
    parts = [f"# {title}", how, "\n".join(_table(found))]
    parts += [f"![{name.partition('.')[0]}]({name})" for name in figures]
    if found.target.source:
        parts.append(f"Paper: {found.target.source}")
    if found.target.notes:
        parts.append("\n".join(f"- {note}" for note in found.target.notes))
    parts.append(_origin(found))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(found: Reproduction) -> Iterator[str]:
    printed = published(found)
    head = ["network", "trained", "density", "seeds"]
    for name in found.target.metrics:
        label = METRICS[name].label
        head += [f"{label}, paper", f"{label}, ours"] if name in printed else [label]
    yield _line(head)
    yield _line(["---", "---", *["---:"] * (len(head) - 2)])
    for entry in found.target.entries:
        if entry.data in found.sources:
            yield _line(_row(found, entry, printed))


def _row(found: Reproduction, entry: Entry, printed: set[str]) -> Iterator[str]:
    yield f"{entry.model}, {entry.data}"
    yield entry.variant
    yield f"{entry.density:g}"
    yield str(len(found.rows.get(entry, [])))
    for name, cell in cells_of(found, entry).items():
        metric = METRICS[name]
        if name in printed:
            yield metric.written(cell.paper)
        yield our_text(metric, cell)


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(found: Reproduction) -> str:
    """Say on which machine, with which versions and from which commits the rows are."""
    rows = [row for rows in found.rows.values() for row in rows]
    if not rows:
        return ""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name)))

    hours = sum(row["wall_s"] for row in rows) / 3600
    machine, device = all_of("machine"), all_of("device")
    where = machine if device.startswith("cpu") else f"{device}; {machine}"  # a CPU is named once
    return (
        f"{len(rows)} trainings, {hours:.1f} hours, on {where}, "
        f"torch {all_of('torch')}, commit {all_of('commit') or 'unknown'}; "
        f"config {all_of('config')}. Every training is a row of runs.csv."
    )

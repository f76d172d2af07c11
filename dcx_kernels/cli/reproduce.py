"""``dcx reproduce``."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dcx_kernels.cli.console import make_console
from dcx_kernels.errors import expected
from dcx_kernels.recipes.reproduce import Reproduction
from dcx_kernels.recipes.reproduce import reproduce as run
from dcx_kernels.recipes.reproduce_figures import check_shown, figures
from dcx_kernels.recipes.reproduce_markdown import table_markdown
from dcx_kernels.recipes.reproduce_scale import Options, data_sources
from dcx_kernels.recipes.reproduce_table import (
    METRICS,
    cells_of,
    least_macs,
    our_text,
    published,
    runs_csv,
    table_csv,
    title_of,
)
from dcx_kernels.recipes.reproduce_target import Target, load_target, target_names
from dcx_kernels.train.atomic import replace_file, replace_text
from dcx_kernels.train.progress import for_console

__all__ = ["reproduce"]

_WIDEST = 1000
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def reproduce(
    *,
    target: str | None,
    listing: bool,
    data: list[str],
    out: Path,
    epochs: int | None,
    seeds: tuple[int, ...] | None,
    densities: tuple[float, ...] | None,
    models: tuple[str, ...] | None,
    variants: tuple[str, ...] | None,
    width: float | None,
    batch_size: int | None,
    lr: float | None,
    image_size: int | None,
    train_images: int | None,
    budget: str | None,
    device: str,
    channels_last: bool,
    threads: int | None,
) -> int:
    """Train what is left of a paper's table or figure; print it beside the published numbers.

    Args:
        target: its name, see `target_names`, or the path of a study; all are listed without one.
        listing: whether to list instead: all targets, or the lines of one.
        data: ``NAME=SOURCE`` or ``SOURCE``, see `data_sources`.
        out: directory of the results, which targets share.
        epochs: of every training.
        seeds, densities, models, variants: the part that is wanted.
        width: factor on the channels of our own networks.
        batch_size, lr: others than the recipe's.
        image_size: height and width of the images, if not the recipe's.
        train_images: how many of the training images are used.
        budget: time after which no training is begun, such as 30m.
        device: where to run.
        channels_last: memory layout.
        threads: CPU threads.
    """
    console = make_console()
    if target is None and not listing:
        raise ValueError(expected(f"a target out of {', '.join(target_names())}", "none"))
    if target is None:
        _list_targets(console)
        return 0
    wanted = load_target(target).narrowed(densities, models, variants, seeds)
    check_shown(wanted)
    if listing:
        _list_lines(wanted, console)
        return 0
    options = Options(
        data_sources(wanted, data),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        width=width,
        image_size=image_size,
        train_images=train_images,
        budget_s=_seconds(budget),
        device=device,
        channels_last=channels_last,
    )
    if threads is not None:
        if threads < 1:
            raise ValueError(expected("--threads of at least 1", threads))
        torch.set_num_threads(threads)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    found = run(wanted, options, out, progress=for_console(console), say=say)
    directory = out / wanted.name
    _print_table(found, console)
    replace_text(directory / "table.csv", table_csv(found))
    replace_text(directory / "runs.csv", runs_csv(found))
    drawn = figures(found)
    for name, content in drawn.items():
        _write(directory / name, content)
    replace_text(directory / "table.md", table_markdown(found, list(drawn)))
    _print_missing(found, console)
    say(f"{directory} holds the table, its trainings and the figure; {out} what goes on later")
    return 1 if found.failed else 0


def _seconds(text: str | None) -> float | None:
    """Read a time such as 90s, 30m, 1.5h or 2d."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(expected("--budget such as 90s, 30m or 1.5h", repr(text)))
    return float(match[1]) * _UNITS[match[2]]


def _print_table(found: Reproduction, console: Console) -> None:
    table = Table(title=title_of(found), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 0, 0, 1)
    table.add_column("", overflow="fold")
    for column in ("density", "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    printed = published(found)
    for name in found.target.metrics:
        label = METRICS[name].label
        if name in printed:
            table.add_column(f"{label}\npaper", justify="right", no_wrap=True)
            label = ""
        table.add_column(f"{label}\nours", justify="right", no_wrap=True, style="bold")
    before = None
    for entry in found.target.entries:
        if entry.data not in found.sources:
            continue
        network = f"{entry.model} on {entry.data}"
        if before != network:
            table.add_section()
            table.add_row(network, style="bold")
        before = network
        numbers = []
        for name, cell in cells_of(found, entry).items():
            if name in printed:
                numbers.append(METRICS[name].written(cell.paper))
            numbers.append(our_text(METRICS[name], cell))
        count = f"{len(found.rows.get(entry, []))}/{len(found.target.seeds)}"
        table.add_row(f"  {entry.variant}", f"{entry.density:g}", count, *numbers)
    # a narrow terminal breaks long lines; digits cut off would be lost
    terminal = console.width
    console.width = _WIDEST
    console.width = max(terminal, Measurement.get(console, console.options, table).maximum)
    console.print(table)
    console.width = terminal
    if found.target.source:
        console.print(f"paper: {found.target.source}", highlight=False)
    for note in found.target.notes:
        console.print(f"  {note}", highlight=False)
    for (data, model, variant), best in least_macs(found).items():
        reach = f"{variant} of {model} on {data}, at least {found.target.reach:g} % right"
        if best is None:
            console.print(f"  {reach}: none", highlight=False)
            continue
        macs = METRICS["macs"].written(cells_of(found, best)["macs"].mean)
        least = f"{macs} M MACs at density {best.density:g}"
        console.print(f"  {reach}: {least}", highlight=False)


def _print_missing(found: Reproduction, console: Console) -> None:
    for why, count in Counter(found.missing.values()).items():
        lines = [
            f"{entry.model}/{entry.data}/{entry.variant}/{entry.density:g}/seed {seed}"
            for (entry, seed), reason in found.missing.items()
            if reason == why
        ]
        shown = ", ".join(lines[:6]) + (f" and {count - 6} more" if count > 6 else "")
        console.print(f"missing: {count} trainings, {why}: {shown}", highlight=False)


def _list_targets(console: Console) -> None:
    table = Table(title="dcx reproduce TARGET", title_justify="left")
    for column in ("target", "what", "data", "networks"):
        table.add_column(column, overflow="fold")
    table.add_column("trainings", justify="right")
    for name in target_names():
        target = load_target(name)
        count = len(target.entries) * len(target.seeds)
        names = (", ".join(target.values(key)) for key in ("data", "model"))
        table.add_row(name, target.title, *names, str(count))
    console.print(table)
    console.print("dcx reproduce TARGET --list shows a target's lines and recipe")


def _list_lines(target: Target, console: Console) -> None:
    table = Table(title=target.title, title_justify="left")
    for column in ("data", "network", "variant", "density", "published"):
        table.add_column(column, overflow="fold")
    for entry in target.entries:
        paper = ", ".join(f"{name} {value}" for name, value in entry.paper.items())
        table.add_row(entry.data, entry.model, entry.variant, f"{entry.density:g}", paper)
    console.print(table)
    for name, part in (("recipe", target.settings), *target.settings_of.items()):
        text = ", ".join(f"{key} {value}" for key, value in part.items())
        console.print(f"{name}: {text}", highlight=False)
    for name, part in target.variants.items():
        text = ", ".join(f"{key} {value}" for key, value in part.items())
        console.print(f"variant {name}: {text}", highlight=False)
    seeds = ",".join(map(str, target.seeds))
    densities = ",".join(f"{density:g}" for density in target.densities())
    console.print(f"seeds: {seeds}; densities: {densities}", highlight=False)
    if target.source:
        console.print(f"paper: {target.source}", highlight=False)


def _write(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    replace_file(path, write)

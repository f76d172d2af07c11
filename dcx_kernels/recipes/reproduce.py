"""Reproduce a table or figure of a paper, or make a study: plan the trainings, do what is left.

Every result is kept. A training is done once: its row in ``results.jsonl`` is found again, by
whichever target needs the same; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcx_kernels.data import ImageData
from dcx_kernels.errors import NonFiniteError, expected
from dcx_kernels.recipes.config import METHODS
from dcx_kernels.recipes.experiment import find_device
from dcx_kernels.recipes.networks import check_trains
from dcx_kernels.recipes.reproduce_recipes import RECIPES
from dcx_kernels.recipes.reproduce_results import Results, describe
from dcx_kernels.recipes.reproduce_scale import Options, read_data, scaled_down, settings_for
from dcx_kernels.recipes.reproduce_target import Entry, Target
from dcx_kernels.recipes.reproduce_work import Work
from dcx_kernels.train.progress import Progress, Silent

__all__ = ["Reproduction", "reproduce"]

_RUNS = "runs"


@dataclass
class Reproduction:
    """What there is of a target.

    Args:
        target: the part of it that was asked for.
        scaled: in which ways the trainings are less than the paper's; empty if they are the same.
        sources: the paper's data set -> what was read for it.
        rows: line -> the rows of its seeds, in their order.
        missing: (line, seed) -> why there is no row.
        failed: whether a training ended with a loss that is not finite.
    """

    target: Target
    scaled: list[str]
    sources: Mapping[str, str]
    rows: dict[Entry, list[dict[str, Any]]] = field(default_factory=dict)
    missing: dict[tuple[Entry, int], str] = field(default_factory=dict)
    failed: bool = False


def reproduce(
    target: Target,
    options: Options,
    directory: Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Reproduction:
    """Train what is left of a target, within the budget.

    It goes seed by seed, so that a budget that ends early leaves whole tables of fewer seeds. The
    budget is looked at before each training; one that has begun is finished.

    Args:
        target: already narrowed to what was asked for.
        options: how far it is scaled down, on which data, where.
        directory: holds ``results.jsonl`` and, under ``runs``, the checkpoints.
        progress: what the user sees of a training.
        say: told about each training.
        clock: seconds.

    Raises:
        DataError: if a data set cannot be read.
        CheckpointError: if a checkpoint is damaged or cannot be written.
        ValueError: on options that fit no recipe or device.
    """
    began, results, progress = clock(), Results(directory), progress or Silent()
    options = options.or_of(target)
    data = read_data(target, options)
    found = Reproduction(target, scaled_down(target, options, data), options.sources)
    works = list(_works(target, options, data, directory / _RUNS, progress))
    _check(works)
    finished = results.rows()
    done = sum(work.key in finished for work in works)
    say(f"{len(works)} trainings, {done} of them finished before")
    for number, work in enumerate(works, 1):
        row = finished.get(work.key)
        if row is None and options.budget_s is not None and clock() - began >= options.budget_s:
            found.missing[work.entry, work.seed] = "the budget is spent"
            continue
        if row is None:
            say(f"{number} of {len(works)}: {_name(work)}")
            try:
                with work.timed() as elapsed:
                    measured = RECIPES[work.settings["recipe"]](work)
            except NonFiniteError as error:  # this one; the others may do better
                found.missing[work.entry, work.seed] = str(error)
                found.failed = True
                continue
            finally:
                progress.close()
            row = describe(work, target, found.scaled, measured, elapsed["wall_s"])
            results.add(row)
            finished[work.key] = row
        found.rows.setdefault(work.entry, []).append(row)
    for entry in target.entries:
        if entry.data not in data:
            for seed in target.seeds:
                found.missing[entry, seed] = f"no data, give --data {entry.data}=SOURCE"
    return found


def _works(
    target: Target,
    options: Options,
    data: Mapping[str, ImageData],
    root: Path,
    progress: Progress,
) -> Iterator[Work]:
    """Yield the trainings in order; all are checked before the first one begins."""
    device = find_device(options.device)
    for seed in target.seeds:
        for entry in target.entries:
            if entry.data not in data:
                continue
            settings = settings_for(target, entry, options)
            start = None
            if "start" in settings:
                first = Entry(entry.data, entry.model, settings["start"], 1.0)
                start = settings_for(target, first, options)
            yield Work(
                entry=entry,
                seed=seed,
                settings=settings,
                start=start,
                source=options.sources[entry.data],
                data=data[entry.data],
                width=options.width or 1.0,
                device=device,
                channels_last=options.channels_last,
                root=root,
                progress=progress,
            )


def _check(works: Sequence[Work]) -> None:
    """Refuse a network that does not fit data or width, and settings that fit no recipe."""
    networks = {(work.entry.data, work.entry.model): work for work in works}
    for (_, model), work in networks.items():
        check_trains(work.network(), work.example(), work.data.num_classes, model)
    for work in works:
        if work.settings.get("recipe") not in RECIPES:
            what = f"{work.entry.variant}: a recipe out of {', '.join(RECIPES)}"
            raise ValueError(expected(what, work.settings.get("recipe")))
        for one in [work] if work.start is None else [work, work.baseline()]:
            if one.settings["recipe"] in ("dense", *METHODS):
                one.config()


def _name(work: Work) -> str:
    entry = work.entry
    density = "" if work.settings["recipe"] == "dense" else f" at density {entry.density:g}"
    return f"{entry.model} on {entry.data}, {entry.variant}{density}, seed {work.seed}"

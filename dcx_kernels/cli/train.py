"""``dcx train``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dcx_kernels.cli.console import make_console
from dcx_kernels.data import download as fetch
from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.recipes.config import METHODS, DCEConfig
from dcx_kernels.recipes.experiment import RESULT, THIN, Experiment, Outcome, run_experiment
from dcx_kernels.recipes.methods import Config
from dcx_kernels.recipes.onnx import export_onnx, missing_packages
from dcx_kernels.recipes.weights import weights_file
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.progress import Progress, for_console
from dcx_kernels.train.report import write_report
from dcx_kernels.train.table import COLUMNS, cells, size
from dcx_kernels.train.tensorboard import TensorBoard

__all__ = ["train"]

_LOG, _REPORT, _ONNX, _CHECKPOINTS = "log.jsonl", "report.html", "thin.onnx", "checkpoints"
_TENSORBOARD = "tensorboard"
_FILES = (RESULT, _LOG, _REPORT, THIN, _ONNX, _CHECKPOINTS, _TENSORBOARD)


def train(
    *,
    data: str,
    download: bool,
    image_size: int,
    model: str,
    width: float,
    weights: str | None,
    method: str,
    compare: tuple[str, ...],
    device: str,
    channels_last: bool,
    out: Path,
    threads: int | None,
    checkpoint_every: int | None,
    resume: bool,
    tensorboard: bool,
    onnx: bool,
    **settings: Any,
) -> int:
    """Train, compare, fine-tune, and write everything into ``out``.

    Args:
        data: see `dcx_kernels.data.load`.
        download: whether to fetch what is missing of it, see `dcx_kernels.data.download`.
        image_size: height and width its images are scaled to.
        model: name of the network, see `build_network`.
        width: factor on its channels.
        weights: trained weights to start from, see `dcx_kernels.recipes.weights`.
        method: ``dce`` or ``dcp``.
        compare: networks to train beside the sparse one.
        device: where to run.
        channels_last: memory layout.
        out: directory of the run.
        threads: CPU threads.
        checkpoint_every: steps between checkpoints.
        resume: continue the run in ``out``.
        tensorboard: whether to write TensorBoard's event files.
        onnx: whether to write ``thin.onnx``.
        **settings: fields of the method's configuration; None: what it has by itself.
    """
    began = time.perf_counter()
    console = make_console()
    if threads is not None:
        if threads < 1:
            raise ValueError(expected("--threads of at least 1", threads))
        torch.set_num_threads(threads)
    experiment = Experiment(data, model, width, compare, device, channels_last, image_size, weights)
    config = _config(method, settings)
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected --out to be a directory, got the file {out}")
    if weights is not None and out.resolve() in weights_file(weights).resolve().parents:
        # an earlier run is set aside, and the one before that is lost
        raise ValueError(expected("--weights outside of --out", f"{weights} inside of {out}"))
    progress: Progress = for_console(console)
    if tensorboard:
        progress = TensorBoard(out / _TENSORBOARD, progress)
    if download:
        for path in fetch(data):
            console.print(f"downloaded {path}", highlight=False)
    if not resume:
        _set_aside(out, console)
    outcome = run_experiment(
        experiment,
        config,
        out,
        resume=resume,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    _print_table(outcome, console)
    if onnx:
        _write_onnx(outcome, out / _ONNX, console)
    write_report(out / _REPORT, outcome.result, read_rows(out / _LOG))
    seconds = time.perf_counter() - began
    console.print(f"{out / _REPORT} shows the figures; this took {seconds:.0f} s", highlight=False)
    return 0


def _config(method: str, settings: dict[str, Any]) -> Config:
    """Return the method's configuration, with what suits the demo where the paper takes days."""
    if method not in METHODS:
        raise ValueError(expected(f"--method to be one of {', '.join(METHODS)}", method))
    kind = METHODS[method]
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in kind.names():
            other = next(m for m in METHODS if name in METHODS[m].names())
            what = f"--{name.replace('_', '-')} with --method {other} only"
            raise ValueError(expected(what, f"it with --method {method}"))
    if kind is DCEConfig:
        given = {"procedure": "single-stage", "finetune_epochs": given["epochs"], **given}
    return kind(**given)


def _set_aside(out: Path, console: Console) -> None:
    """Move the files of an earlier run out of the way: never mixed with new ones, never lost."""
    earlier = [out / name for name in _FILES if (out / name).exists()]
    if not earlier:
        return
    previous = out / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for path in earlier:
        path.rename(previous / path.name)
    console.print(f"moved the earlier run in {out} to {previous} (--resume would continue it)")


def _print_table(outcome: Outcome, console: Console) -> None:
    table = Table(title=_title(outcome.result))
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for arm in outcome.result["arms"]:
        table.add_row(*cells(arm), style="bold" if arm["arm"] == "sparse" else None)
    console.print(table)
    arms = {arm["arm"]: arm for arm in outcome.result["arms"]}
    sparse = arms["sparse"]
    for other in (arms[name] for name in ("mask", "dense") if name in arms):
        console.print(_gain("a sparse step", sparse, other, ""), highlight=False)
    if "mask" in arms and sparse["selecting_step_ms"] is not None:
        what = "the same while channels change at every step"
        console.print(_gain(what, sparse, arms["mask"], "selecting_"), highlight=False)


def _gain(what: str, sparse: dict[str, Any], other: dict[str, Any], prefix: str) -> str:
    time, memory = (other[prefix + k] / sparse[prefix + k] for k in ("step_ms", "saved_bytes"))
    return (
        f"{what}: {sparse[prefix + 'step_ms']:.1f} ms, {size(sparse[prefix + 'saved_bytes'])}; "
        f"{other['arm']} takes {time:.2f}x the time and {memory:.2f}x the memory"
    )


def _title(result: dict[str, Any]) -> str:
    experiment, config = result["experiment"], result["config"]
    kept, total = sum(result["final"].values()), sum(result["channels"].values())
    statistics = "recalibrated" if config["recalibrate"] else "not recalibrated"
    return (
        f"{result['method']}: {experiment['model']} x {experiment['width']:g} on "
        f"{experiment['data']}, {kept} of {total} channels, residual {config['residual']}, "
        f"batch norm {statistics}"
    )


def _write_onnx(outcome: Outcome, path: Path, console: Console) -> None:
    if missing := missing_packages():
        names = " and ".join(missing)
        console.print(f"no {path.name}: {names} not installed (pip install dcx-kernels\\[onnx])")
        return
    try:
        checked = export_onnx(outcome.thin, outcome.example, path)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error
    console.print(f"{path}: {checked}", highlight=False)

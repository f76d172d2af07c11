"""All GPU benchmarks within a few minutes: compile in parallel, measure part by part, then tables.

Parts run in processes of their own, see `benchmarks.gpu_plan`: **ops** (`benchmarks.gpu_ops`) and
**steps** (`benchmarks.gpu_step`). Rows are written as they are measured; the tables come last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_ops, gpu_step
from benchmarks.environment import ROOT
from benchmarks.gpu import require_gpu
from benchmarks.gpu_plan import OUT_OF_TIME, Budget, Progress
from benchmarks.gpu_plot import draw_ops, draw_steps
from benchmarks.gpu_table import print_op_tables, print_step_table
from benchmarks.rows import GpuOpRow, GpuStepRow, read_rows

__all__ = ["PARTS", "Part", "main", "run_part"]


class Part(NamedTuple):
    """A benchmark.

    Args:
        module: that is run.
        file: of its rows.
        share: of the time that is left when it begins, if another part follows.
        warmers: of all processes that compile, how many sixteenths are its own.
    """

    module: str
    file: str
    share: float
    warmers: int


PARTS = {
    "ops": Part("benchmarks.gpu_ops", Path(gpu_ops.OUT).name, 0.42, 8),
    "steps": Part("benchmarks.gpu_step", Path(gpu_step.OUT).name, 1.0, 4),
}
_WARM_SHARE = 0.2  # of all the time
_LAST = 15.0  # seconds for tables and plots
_HANGS = 100.0  # seconds that a block may take
_START = 8.0  # seconds until a process has imported torch
_GRACE = 10.0  # seconds that a part may take longer than it was told to


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print what is missing, then the tables; return 1 if something failed."""
    o = _parser().parse_args(argv)
    if o.device == "cuda":
        require_gpu("make bench-gpu")
    budget = Budget(o.seconds)
    common = ["--device", o.device, "--commit", o.commit, *(["--tiny"] if o.tiny else [])]
    names = [o.only] if o.only else list(PARTS)
    _warm(names, common, min(_WARM_SHARE * o.seconds, budget.left), o.jobs)
    notes = []
    for name in names:
        left = budget.left - _LAST
        seconds = left * (PARTS[name].share if name != names[-1] else 1.0)
        print(f"--- {name}: at most {seconds:.0f} s", flush=True)
        found = run_part(PARTS[name], o.out / PARTS[name].file, common, seconds)
        notes += [f"{name}: {note}" for note in found]
    plots = _draw(names, o.out)
    print("rows and plots:", ", ".join(str(plot.with_suffix(".*")) for plot in plots))
    print("\n".join(["missing:", *(f"  {note}" for note in notes)]) if notes else "nothing missing")
    _print_tables(names, o.out)
    return int(any(OUT_OF_TIME not in note for note in notes))


def run_part(part: Part, out: Path, common: Sequence[str], seconds: float) -> list[str]:
    """Run a part, again behind every block that breaks its process; return what is missing.

    Args:
        part: which.
        out: file of its rows.
        common: options that all parts take.
        seconds: that it may take.
    """
    budget = Budget(seconds)
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "progress.json"
        while True:
            command = [sys.executable, "-m", part.module, *common, "--append", "--out", str(out)]
            limit = max(1.0, budget.left - _START)
            command += ["--progress", str(path), "--seconds", f"{limit:.0f}"]
            before = Progress(path).next
            status = _watch(command, path, budget.left + _GRACE)
            progress = Progress(path)
            if status == 0:
                return progress.notes
            if budget.left <= 0:
                progress.out_of_time()
                return progress.notes
            if progress.running:
                progress.end([f"{progress.running}: {_why(status)}"])
            if progress.next == before:  # it fails before any block
                return [*progress.notes, f"{part.module} ended early: {_why(status)}"]


def _watch(command: Sequence[str], progress: Path, limit: float) -> int | None:
    """Run a process; return its exit status, or None if it hung or took too long."""
    started = time.monotonic()
    changed, block = started, ""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            at = progress.read_text(encoding="utf-8") if progress.exists() else ""
            if at != block:
                changed, block = now, at
            if now - started > limit or now - changed > _HANGS:
                return None
        return process.returncode
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _why(status: int | None) -> str:
    if status is None:
        return "stopped: it took too long"
    return f"its process ended with status {status}"


def _warm(names: Sequence[str], common: Sequence[str], seconds: float, jobs: int) -> None:
    """Fill Triton's cache from several processes: compiling is most of a first run."""
    jobs = jobs or max(1, min(16, os.cpu_count() or 1))
    budget, processes = Budget(seconds), []
    for name in names:
        count = max(1, PARTS[name].warmers * jobs // 16)
        for share in range(count):
            command = [sys.executable, "-m", PARTS[name].module, *common]
            command += ["--warm", f"{share}/{count}"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, cwd=ROOT, **quiet))
    print(f"--- compiling in {len(processes)} processes, at most {seconds:.0f} s", flush=True)
    for process in processes:
        try:
            process.wait(timeout=max(0.1, budget.left))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"    {seconds - budget.left:.0f} s", flush=True)


def _draw(names: Sequence[str], folder: Path) -> list[Path]:
    draw = {"ops": draw_ops, "steps": draw_steps}
    paths = {name: folder / PARTS[name].file for name in names}
    return [draw[name](path) for name, path in paths.items() if path.exists()]


def _print_tables(names: Sequence[str], folder: Path) -> None:
    for name in names:
        path = folder / PARTS[name].file
        if path.exists() and name == "ops":
            print_op_tables(read_rows(path, GpuOpRow))
        elif path.exists():
            print_step_table(read_rows(path, GpuStepRow))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__)
    add = parser.add_argument
    add("--only", choices=["", *PARTS], default="", help="one part; default: all")
    add("--seconds", type=float, default=450.0, help="for everything, default 450")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--commit", default="", help="of the checkout, where git is not at hand")
    add("--jobs", type=int, default=0, help="processes that compile, default: cores, at most 16")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    add("--tiny", action="store_true", help="tiny shapes and few rounds, for a dry run")
    return parser


if __name__ == "__main__":
    sys.exit(main())

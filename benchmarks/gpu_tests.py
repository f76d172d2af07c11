"""The tests that need a GPU, in parallel, and compute-sanitizer: what ``make test-gpu`` runs.

Parts: **tests** are those marked ``gpu`` and all of tests/kernels/triton, whose kernels run
natively where there is CUDA; **sanitize** runs `benchmarks.gpu_smoke` under compute-sanitizer,
where that is installed.

This module is also the pytest plugin that picks those tests; no other file is even imported, so
that what only other tests need may be missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

__all__ = ["PARTS", "main", "sanitizer_commands", "tests_command"]

PARTS = ("tests", "sanitize")
# pytest loads this module before the conftest that has a say in how triton is imported: so none
# of our modules, which import it, is imported above
ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "kernels" / "triton"
FOLDERS = ("kernels", "ops", "nn", "optim", "graph", "selectors", "train", "benchmarks")
_TOOLS = ("memcheck", "racecheck", "initcheck")
_SANITIZER_SECONDS = 100.0
_STOPPING = 15.0  # seconds that pytest may take to report after it was interrupted


# --- the plugin -----------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out test files without a word about a GPU."""
    if collection_path.suffix != ".py" or collection_path.name == "conftest.py":
        return None
    if NATIVE in collection_path.parents:
        return None
    return None if "mark.gpu" in collection_path.read_text(encoding="utf-8") else True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that do not use one."""
    kept = [item for item in items if "gpu" in item.keywords or NATIVE in item.path.parents]
    dropped = [item for item in items if item not in set(kept)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


# --- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if something failed."""
    o = _parser().parse_args(argv)
    if not o.dry:
        from benchmarks.gpu import require_gpu

        require_gpu("make test-gpu")
    started = time.monotonic()
    results = {}
    for part in [o.only] if o.only else PARTS:
        left = o.seconds - (time.monotonic() - started)
        if part == "tests":
            results[part] = _run(tests_command(o.jobs), left)
        else:
            results[part] = _sanitize(left)
    took = time.monotonic() - started
    words = ", ".join(f"{part}: {'failed' if bad else 'passed'}" for part, bad in results.items())
    print(f"{words} ({took:.0f} s)")
    return int(any(results.values()))


def tests_command(jobs: int) -> list[str]:
    """Return the command line of pytest, in parallel where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "--durations=15"]
    command += ["-W", "default"]  # a machine's own versions may warn of what ours do not
    command += ["-p", "no:benchmark"]  # it warns of pytest-xdist, and warnings are errors
    if jobs > 1 and _installed("xdist"):
        # neighbours compile the same kernels: they stay in one process as long as all are busy
        command += ["-n", str(jobs), "--dist", "worksteal"]
    return [*command, "-q", *(f"tests/{folder}" for folder in FOLDERS)]


def sanitizer_commands(tool: str) -> list[list[str]]:
    """Return a command line for each of compute-sanitizer's tools.

    Only memcheck sees networks: the others report what cuDNN and cuBLAS do on purpose.
    """
    commands = []
    for name in _TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "5"]
        command += [sys.executable, "-m", "benchmarks.gpu_smoke"]
        commands.append(command + (["--networks"] if name == "memcheck" else []))
    return commands


def _sanitize(left: float) -> bool:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("sanitize: left out, compute-sanitizer is not on the PATH.")
        return False
    smoke = [sys.executable, "-m", "benchmarks.gpu_smoke", "--networks"]
    if _run(smoke, left):  # natively first: it has to be right, and to have compiled its kernels
        return True
    # without torch's cache every tensor is memory of its own, whose ends are known
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment) for command in sanitizer_commands(tool)
    ]
    end, bad = time.monotonic() + min(left, _SANITIZER_SECONDS), False
    for name, process in zip(_TOOLS, processes, strict=True):
        try:
            status = process.wait(timeout=max(0.1, end - time.monotonic()))
            words = "clean" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
            words = "FAILED: out of time"
        bad = bad or status != 0
        print(f"sanitize: {name}: {words}", flush=True)
    return bad


def _run(command: Sequence[str], seconds: float) -> bool:
    """Run a command, interrupted when the time is over; return whether it failed."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(timeout=max(1.0, seconds)) != 0
    except subprocess.TimeoutExpired:
        print(f"out of time: {' '.join(command[:3])} is interrupted.", flush=True)
        process.send_signal(signal.SIGINT)  # pytest reports what it has
        try:
            process.wait(timeout=_STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return True


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=__doc__)
    add = parser.add_argument
    add("--only", choices=["", *PARTS], default="", help="one part; default: all")
    add("--jobs", type=int, default=4, help="processes that share the GPU, default 4")
    add("--seconds", type=float, default=450.0, help="for everything, default 450")
    add("--dry", action="store_true", help="without a GPU, where all tests are skipped")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Blocks in order of importance, until the time is over; what fails or is left out is said.

A kernel that reads where it must not takes its whole process with it. So a part of the benchmark
is a process of its own that writes down which block it is at: `gpu_bench` starts it again behind
the block that broke it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "BROKEN", "OUT_OF_TIME", "Block", "Budget", "Progress", "is_broken", "part_parser", "run_plan",
    "short", "warm_share",
]  # fmt: skip

BROKEN = 75  # exit status: go on in another process
OUT_OF_TIME = "out of time"
_BROKEN = ("CUDA error", "illegal memory access", "misaligned address", "device-side assert")
_MESSAGE = 300  # characters of an error that are reported


class Block(NamedTuple):
    """What is measured together.

    Args:
        name: what messages call it.
        run: measures it, writes its rows, and returns notes about what is missing.
        warm: runs it once, so that its kernels get compiled.
    """

    name: str
    run: Callable[[], Sequence[str]]
    warm: Callable[[], object]


class Budget:
    """Seconds from now on.

    Args:
        seconds: of it.
        clock: for tests.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - self._clock()


class Progress:
    """Where a part is, in a file that outlives its process.

    Args:
        path: of the file; None: nowhere.

    Attributes:
        next: index of the block to begin with.
        running: name of the block at work, or "".
        names: of all blocks.
        notes: what is missing, and why.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.next, self.running = 0, ""
        self.names: list[str] = []
        self.notes: list[str] = []
        if path is not None and path.exists() and path.stat().st_size:
            state = json.loads(path.read_text(encoding="utf-8"))
            self.next, self.running = state["next"], state["running"]
            self.names, self.notes = state["names"], state["notes"]

    def begin(self, index: int, name: str) -> None:
        """Write down which block begins: if it never ends, the one behind it is next."""
        self.next, self.running = index + 1, name
        self._save()

    def out_of_time(self) -> None:
        """Write down that the block at work, if any, and all behind it are not measured."""
        first = self.next - 1 if self.running else self.next
        self.end([f"{OUT_OF_TIME}, not measured: {', '.join(self.names[first:])}"])

    def end(self, notes: Sequence[str] = ()) -> None:
        """Write down that the block has ended."""
        self.running = ""
        self.notes += notes
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            state = {name: getattr(self, name) for name in ("next", "running", "names", "notes")}
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(state), encoding="utf-8")
            new.replace(self.path)  # never half a file


def run_plan(blocks: Sequence[Block], budget: Budget, progress: Progress) -> None:
    """Run the blocks from where ``progress`` is; a block that fails does not stop the others.

    Raises:
        SystemExit: with `BROKEN`, if an error leaves nothing for the others to run on.
    """
    progress.names = [block.name for block in blocks]
    for index in range(progress.next, len(blocks)):
        if budget.left <= 0:
            progress.out_of_time()
            return
        block = blocks[index]
        progress.begin(index, block.name)
        try:
            progress.end(block.run())
        except Exception as error:
            progress.end([f"{block.name}: {short(error)}"])
            if is_broken(error):
                raise SystemExit(BROKEN) from error


def is_broken(error: BaseException) -> bool:
    """Return whether an error means that this process can use its GPU no longer."""
    return any(part in str(error) for part in _BROKEN)


def short(error: Exception) -> str:
    """Return an error as a line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _MESSAGE else text[:_MESSAGE] + "..."
    return f"{type(error).__name__}: {text}"


def warm_share(blocks: Sequence[Block], share: str) -> None:
    """Run every n-th block once; what fails will fail again, and is reported then.

    Args:
        blocks: of the plan.
        share: "i/n".
    """
    first, step = (int(part) for part in share.split("/"))
    for block in blocks[first::step]:
        try:
            block.warm()
        except Exception as error:
            if is_broken(error):
                raise SystemExit(BROKEN) from error


def part_parser(name: str, what: str, out: str) -> argparse.ArgumentParser:
    """Return the options that the parts have in common."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=what)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    add("--tiny", action="store_true", help="tiny shapes and few rounds, for a dry run")
    add("--seconds", type=float, default=1e9, help="begin no block after so many, default: never")
    add("--progress", type=Path, default=None, help="file that says where an earlier run was")
    add("--warm", metavar="I/N", default=None, help="compile the kernels of every N-th block only")
    add("--commit", default="", help="of the checkout, where git is not at hand")
    add("--append", action="store_true", help="add to the rows of an earlier run")
    add("--out", type=Path, default=Path(out), help=f"default {out}")
    return parser

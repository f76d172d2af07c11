"""Finished trainings of reproduced tables, one JSON object a line; each says how it was made."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcx_kernels.recipes.reproduce_target import Target
from dcx_kernels.recipes.reproduce_work import Work
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.machine import describe_device, describe_machine, versions

__all__ = ["RESULTS", "Results", "describe"]

RESULTS = "results.jsonl"


class Results:
    """The file of finished trainings; several targets may share it, and so their trainings.

    Args:
        directory: holds ``results.jsonl``, once there is a row.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / RESULTS

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the rows by the key of their training; of two with the same, the later one."""
        return {row["run"]: row for row in read_rows(self.path) if "run" in row}

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row in one write: two processes may share the file, each with seeds of its own.

        What a kill or a full disk left of a line is skipped by `rows`, and ended here.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps(dict(row)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def describe(
    work: Work, target: Target, scaled: Sequence[str], measured: Mapping[str, Any], wall_s: float
) -> dict[str, Any]:
    """Return the row of a finished training: what, how, where, by which code; then the numbers.

    Args:
        work: the training.
        target: the table it was done for; another may use it as well.
        scaled: in which way it is less than the paper's, in words.
        measured: what its recipe returned.
        wall_s: how long it took, without interruptions and without what another training shared.
    """
    machine, installed = describe_machine(), versions()
    return {
        "run": work.key,
        "target": target.name,
        "config": target.config,
        "variant": work.entry.variant,
        "data": work.entry.data,
        **work.identity,
        "density": work.entry.density,
        "scaled": list(scaled),
        "commit": _commit(),
        "dcx_kernels": installed["dcx_kernels"],
        "torch": installed["torch"],
        "machine": f"{machine['processor']}, {machine['threads']} threads",
        "device": describe_device(work.device),
        "wall_s": round(wall_s, 3),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **measured,
    }


def _commit() -> str:
    """Return the commit of the checkout this package is in, marked if files differ; else ""."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return ""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

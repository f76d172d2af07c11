"""The log of a run: one JSON object a line, appended to, exact after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dcx_kernels.errors import CheckpointError
from dcx_kernels.train.atomic import replace_text

__all__ = ["TIMINGS", "Log", "read_rows"]

TIMINGS = ("step_ms", "seconds")
"""Entries that differ between two otherwise identical runs."""


class Log:
    """The rows of one arm (sparse, mask, dense, thin) in the log file that all arms share.

    Args:
        path: the log file, created when the first row is written; None counts rows only.
        arm: name written into each row.
    """

    def __init__(self, path: Path | None, arm: str = "") -> None:
        self.path = path
        self.arm = arm
        self.rows = 0
        self._file: TextIO | None = None

    def truncate(self, rows: int) -> None:
        """Keep the first ``rows`` rows of this arm; rows of other arms stay.

        A run that goes on from a checkpoint calls this with the number of rows there were then, so
        that none is doubled. A line torn by a kill goes as well.
        """
        self.close()
        if self.path is None:
            self.rows = rows
            return
        kept: list[dict[str, Any]] = []
        self.rows = 0
        for row in read_rows(self.path):
            if row.get("arm") == self.arm:
                if self.rows == rows:
                    continue
                self.rows += 1
            kept.append(row)
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        """Append one row and hand it to the operating system.

        Raises:
            CheckpointError: if it cannot be written, for example because the disk is full.
        """
        self.rows += 1
        if self.path is None:
            return
        with self._errors():
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps({"arm": self.arm, **row}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the rows to disk: done before each checkpoint, which counts on them.

        Raises:
            CheckpointError: if the disk refuses.
        """
        if self._file is not None:
            with self._errors():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the next row opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # every row was flushed, or has complained already
                file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"could not write log {self.path}: {error.strerror or error}"
            raise CheckpointError(message) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log file, without a last line that a kill tore; none if no file."""
    if not path.exists():
        return []
    return list(_parse(path.read_text(encoding="utf-8").splitlines()))


def _parse(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row

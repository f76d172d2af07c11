"""The rows of the log as TensorBoard's curves."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcx_kernels.train.position import Position
from dcx_kernels.train.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard", "scalars"]

_SKIPPED = ("step", "epoch")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the curves that a row of the log adds a point to.

    ``step/loss`` and the like for its numbers; ``step/kept/GROUP`` (rows of an epoch: of the final
    selection so far) for the kept fraction of each group, ``epoch/score/GROUP`` for its mean score.
    """
    kind = row["kind"]
    found = {
        f"{kind}/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in _SKIPPED
    }
    for group, width in row.get("widths", {}).items():
        found[f"{kind}/kept/{group}"] = width / row["channels"][group]
    for group, score in row.get("scores", {}).items():
        found[f"{kind}/score/{group}"] = float(score)
    return found


class TensorBoard:
    """Write event files beside whatever else shows a run.

    Each arm is a run of TensorBoard's own, in a folder of its name. A run that goes on after an
    interruption goes on in the same curves: points behind its checkpoint are taken back.

    Args:
        directory: where the folders go; ``tensorboard --logdir`` gets it.
        inner: what the user sees beside it.

    Raises:
        ImportError: if the package tensorboard is not installed.
    """

    def __init__(self, directory: Path, inner: Progress) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "--tensorboard needs the package tensorboard (pip install dcx-kernels[tensorboard])"
            ) from error
        self._make: type[SummaryWriter] = SummaryWriter
        self._directory = directory
        self._inner = inner
        self._arm = ""
        self._writer: SummaryWriter | None = None

    def arm(self, name: str) -> None:
        """Announce what is trained next."""
        self._arm = name
        self._inner.arm(name)

    def start(self, epochs: int, steps: int, position: Position) -> None:
        """Start at ``position`` of ``epochs`` epochs of ``steps`` steps."""
        self._end()
        folder = self._directory / self._arm
        self._writer = self._make(str(folder), purge_step=position.step + 1)
        self._inner.start(epochs, steps, position)

    def show(self, position: Position, row: Mapping[str, Any]) -> None:
        """Add a point to each curve of the row, at the number of its step."""
        if self._writer is not None:
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])
            if row["kind"] == "epoch":
                self._writer.flush()
        self._inner.show(position, row)

    def close(self) -> None:
        """Write what is left, and leave the terminal as it was."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._inner.close)
            self._end()

    def _end(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

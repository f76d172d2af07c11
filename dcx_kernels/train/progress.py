"""What the user sees while a run is under way."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dcx_kernels.train.position import Position

__all__ = ["Lines", "Live", "Progress", "Silent", "for_console"]


class Progress(Protocol):
    """Shows a run. `arm` names what is trained; `show` gets each row of the log."""

    def arm(self, name: str) -> None:
        """Announce what is trained next."""

    def start(self, epochs: int, steps: int, position: Position) -> None:
        """Start at ``position`` of ``epochs`` epochs of ``steps`` steps."""

    def show(self, position: Position, row: Mapping[str, Any]) -> None:
        """Show a finished step or epoch."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Silent:
    """Show nothing."""

    def arm(self, name: str) -> None:
        """Show nothing."""

    def start(self, epochs: int, steps: int, position: Position) -> None:
        """Show nothing."""

    def show(self, position: Position, row: Mapping[str, Any]) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""


class Lines:
    """One line per epoch: for logs, pipes and continuous integration."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._arm = ""
        self._epochs = 0
        self._step_ms: list[float] = []

    def arm(self, name: str) -> None:
        """Announce what is trained next."""
        self._arm = name

    def start(self, epochs: int, steps: int, position: Position) -> None:
        """Start at ``position`` of ``epochs`` epochs of ``steps`` steps."""
        self._epochs = epochs
        self._step_ms = []

    def show(self, position: Position, row: Mapping[str, Any]) -> None:
        """Print a finished epoch."""
        if row["kind"] == "step":
            self._step_ms.append(row["step_ms"])
            return
        text = f"{self._arm:<6} epoch {row['epoch'] + 1:>3}/{self._epochs}"
        if self._step_ms:
            text += f"  {median(self._step_ms):7.1f} ms/step"
        text += f"  loss {row['train_loss']:.4f}  train {100 * row['train_accuracy']:6.2f} %"
        if "test_accuracy" in row:
            text += f"  test {100 * row['test_accuracy']:6.2f} %"
        if "widths" in row:
            text += f"  {sum(row['widths'].values())} channels"
        self.console.print(text, highlight=False)
        self._step_ms = []

    def close(self) -> None:
        """Nothing to put back."""


class Live(Lines):
    """A live bar per arm in the terminal, above it one line per epoch."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = RichProgress(
            TextColumn("[bold]{task.fields[arm]:<6}"),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def start(self, epochs: int, steps: int, position: Position) -> None:
        """Start the bar at ``position``."""
        super().start(epochs, steps, position)
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            "",
            total=epochs * steps,
            completed=position.step,
            arm=self._arm,
            epoch=f"{min(position.epoch + 1, epochs)}/{epochs}",
            status="",
        )
        self._bar.start()

    def show(self, position: Position, row: Mapping[str, Any]) -> None:
        """Move the bar; print a line above it after an epoch."""
        super().show(position, row)
        if self._task is None or row["kind"] != "step":
            return
        status = (
            f"{row['step_ms']:.0f} ms  loss {position.loss:.3f}  "
            f"accuracy {100 * position.accuracy:.1f} %"
        )
        if row["active"]:
            status += f"  {row['active']} channels"
        epoch = f"{position.epoch + 1}/{self._epochs}"
        self._bar.update(self._task, completed=position.step, status=status, epoch=epoch)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def for_console(console: Console) -> Progress:
    """Return a live display for a terminal, plain lines for anything else."""
    return Live(console) if console.is_terminal else Lines(console)

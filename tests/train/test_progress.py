"""Plain lines in a pipe, a live bar in a terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from dcx_kernels.train.position import Position
from dcx_kernels.train.progress import Lines, Live, Progress, for_console


def _play(progress: Progress) -> None:
    position = Position()
    progress.arm("sparse")
    progress.start(2, 3, position)
    for epoch in range(2):
        for _ in range(3):
            position.count(0.5, 6, 8)
            step: dict[str, Any] = {"kind": "step", "step_ms": 20.0, "active": 14}
            progress.show(position, step)
        row = {"kind": "epoch", "epoch": epoch, "train_loss": 0.5, "train_accuracy": 0.75}
        progress.show(position, {**row, "test_accuracy": 0.625, "widths": {"a": 4, "b": 10}})
        position.next_epoch()
    progress.close()


def test_progress_in_a_pipe_is_one_line_per_epoch() -> None:
    buffer = io.StringIO()
    progress = for_console(Console(file=buffer, width=200))
    assert type(progress) is Lines
    _play(progress)
    lines = buffer.getvalue().splitlines()
    assert len(lines) == 2
    for text in ("sparse", "epoch   2/2", "20.0 ms/step", "loss 0.5000", "75.00 %", "62.50 %"):
        assert text in lines[1]
    assert "14 channels" in lines[1]


def test_progress_in_a_terminal_is_live() -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, width=160, force_terminal=True)
    progress = for_console(console)
    assert isinstance(progress, Live)
    _play(progress)
    text = buffer.getvalue()
    assert "20 ms" in text
    assert "accuracy 75.0 %" in text
    assert "14 channels" in text

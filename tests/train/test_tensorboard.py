"""TensorBoard gets every number of the log, at its step, in a run of its own for each arm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dcx_kernels.data import Loader
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.loop import Trainer
from dcx_kernels.train.position import Position
from dcx_kernels.train.progress import Silent
from dcx_kernels.train.tensorboard import TensorBoard, scalars

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what event files hold back, by tensorboard's own reader."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_scalars_of_a_row_are_its_numbers_and_fractions() -> None:
    row: dict[str, Any] = {"kind": "epoch", "step": 40, "epoch": 1, "lr": 0.1}
    row |= {"widths": {"a": 1, "b": 6}, "channels": {"a": 4, "b": 8}, "scores": {"a": 0.5}}
    assert scalars(row) == {
        "epoch/lr": 0.1,
        "epoch/kept/a": 0.25,
        "epoch/kept/b": 0.75,
        "epoch/score/a": 0.5,
    }


def test_curves_are_the_log(
    tmp_path: Path, trainer_in: Callable[..., Trainer], loader: Loader, test_loader: Loader
) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path / "tb", Silent())
    board.arm("sparse")
    trainer = trainer_in(tmp_path, progress=board)
    trainer.fit(loader, 3, eval_loader=test_loader)
    board.close()
    found = curves(tmp_path / "tb" / "sparse")
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(tmp_path / "log.jsonl"):
        for name, value in scalars(row).items():
            wanted.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert found == wanted
    assert {"step/loss", "epoch/test_accuracy", "epoch/kept/conv1", "epoch/score/conv2"} <= set(
        found
    )
    assert [step for step, _ in found["epoch/lr"]] == [5, 10, 15]


def test_resumed_run_takes_later_points_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def show(first: int, last: int, loss: float) -> None:
        board = TensorBoard(tmp_path, Silent())
        board.arm("mask")
        board.start(1, 10, Position(step=first))
        for step in range(first + 1, last + 1):
            row = {"kind": "step", "step": step, "epoch": 0, "loss": loss}
            board.show(Position(step=step), row)
        board.close()

    show(0, 5, loss=1.0)
    show(3, 6, loss=2.0)  # its checkpoint was of step 3
    assert curves(tmp_path / "mask")["step/loss"] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_what_the_user_sees_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    seen: list[str] = []

    class Inner(Silent):
        def arm(self, name: str) -> None:
            seen.append(name)

        def start(self, epochs: int, steps: int, position: Position) -> None:
            seen.append("start")

        def show(self, position: Position, row: Mapping[str, Any]) -> None:
            seen.append("show")

        def close(self) -> None:
            seen.append("close")

    board = TensorBoard(tmp_path, Inner())
    board.arm("dense")
    board.start(1, 1, Position())
    board.show(Position(step=1), {"kind": "step", "step": 1, "epoch": 0, "loss": 0.0})
    board.close()
    assert seen == ["dense", "start", "show", "close"]


def test_without_the_package_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"^--tensorboard needs the package tensorboard \(pip"):
        TensorBoard(tmp_path, Silent())

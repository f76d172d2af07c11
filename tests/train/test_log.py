"""The log has each row once, whatever happened in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcx_kernels.errors import CheckpointError
from dcx_kernels.train.log import Log, read_rows


def test_log_rows_come_back(tmp_path: Path) -> None:
    with Log(tmp_path / "runs" / "log.jsonl", "sparse") as log:
        log.write(kind="step", step=1, loss=0.1)
        log.write(kind="step", step=2, loss=1 / 3)
        log.sync()
    assert log.rows == 2
    assert log.path is not None
    assert read_rows(log.path)[1] == {"arm": "sparse", "kind": "step", "step": 2, "loss": 1 / 3}


def test_log_truncate_drops_later_rows_of_this_arm_only(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Log(path, "mask") as mask, Log(path, "sparse") as sparse:
        for step in range(4):
            sparse.write(step=step)
        for step in range(2):
            mask.write(step=step)
    with Log(path, "sparse") as again:
        again.truncate(2)
        assert again.rows == 2
        again.write(step=2)
    found = [(row["arm"], row["step"]) for row in read_rows(path)]
    assert found == [("sparse", 0), ("sparse", 1), ("mask", 0), ("mask", 1), ("sparse", 2)]


def test_log_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Log(path, "sparse") as log:
        log.write(step=1)
        log.write(step=2)
    path.write_bytes(path.read_bytes()[:-7])
    assert [row["step"] for row in read_rows(path)] == [1]
    with Log(path, "sparse") as again:
        again.truncate(2)
        assert again.rows == 1
        again.write(step=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with Log(full, "sparse") as log, pytest.raises(CheckpointError, match="No space left"):
        log.write(step=1)


def test_log_without_file(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", "sparse")
    log.truncate(0)
    log.sync()
    assert read_rows(tmp_path / "log.jsonl") == []
    assert not list(tmp_path.iterdir())


def test_log_without_path_only_counts() -> None:
    log = Log(None)
    log.write(step=1)
    assert log.rows == 1
    log.truncate(0)
    assert log.rows == 0

"""The log has each row once, whatever happened in between."""

from __future__ import annotations

from pathlib import Path

from dcx_kernels.train.log import Log, read_rows


def test_log_rows_come_back(tmp_path: Path) -> None:
    log = Log(tmp_path / "runs" / "log.jsonl", "sparse")
    log.write(kind="step", step=1, loss=0.1)
    log.write(kind="step", step=2, loss=1 / 3)
    log.sync()
    assert log.rows == 2
    assert read_rows(log.path)[1] == {"arm": "sparse", "kind": "step", "step": 2, "loss": 1 / 3}


def test_log_truncate_drops_later_rows_of_this_arm_only(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    mask, sparse = Log(path, "mask"), Log(path, "sparse")
    for step in range(4):
        sparse.write(step=step)
    for step in range(2):
        mask.write(step=step)
    again = Log(path, "sparse")
    again.truncate(2)
    assert again.rows == 2
    again.write(step=2)
    found = [(row["arm"], row["step"]) for row in read_rows(path)]
    assert found == [("sparse", 0), ("sparse", 1), ("mask", 0), ("mask", 1), ("sparse", 2)]


def test_log_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, "sparse")
    log.write(step=1)
    log.write(step=2)
    log.close()
    path.write_bytes(path.read_bytes()[:-7])
    assert [row["step"] for row in read_rows(path)] == [1]
    again = Log(path, "sparse")
    again.truncate(2)
    assert again.rows == 1
    again.write(step=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_log_without_file(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", "sparse")
    log.truncate(0)
    log.sync()
    assert read_rows(log.path) == []
    assert not log.path.exists()

"""The benchmark of gated evaluation runs, gates its numbers, and writes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import fbs_latency
from benchmarks.rows import read_rows


def test_writes_a_row_for_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "rows.csv", torch.get_num_threads()
    options = "--threads 1 --clock cpu --rounds 20 --batches 1 2 --width 0.1 --out"
    try:
        fbs_latency.main([*options.split(), str(out)])
    finally:
        torch.set_num_threads(threads)
    rows = read_rows(out, fbs_latency.FbsRow)
    assert [(row.batch, row.arm) for row in rows] == [
        (batch, arm) for batch in (1, 2) for arm in ("dense", "mask", "sparse")
    ]
    for row in rows:
        assert row.median_ms > 0 and row.rounds == 20 and row.clock == "cpu"
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.median_ms, rel=1e-2)
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_refuses_to_time_what_is_wrong() -> None:
    arms = fbs_latency.networks(0.5, width=0.1)
    with torch.no_grad():
        arms["sparse"].classifier.weight.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(AssertionError, match="relative error"):
        fbs_latency.measure(arms, torch.randn(1, 3, 32, 32), 1, lambda: 0.0)

"""The native library's benchmark: what it writes, and that it times nothing wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import native_ops
from benchmarks.native_cases import Case, cases
from benchmarks.rows import NativeRow, read_rows
from dcx_kernels.kernels.native import load

needs_library = pytest.mark.skipif(load("cpu") is not None, reason="needs the native library")


def test_what_is_wrong_is_not_timed() -> None:
    arms = {"reference": lambda: torch.ones(3), "native": lambda: torch.tensor([1.0, 1.0, 1.001])}
    with pytest.raises(AssertionError, match=r"sum, 3: relative error 5\.8e-04"):
        native_ops.measure(Case("sum", "3", "", 0, arms), rounds=1)


def test_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    # one clock for all: each call takes as long as its arm says
    now = [0.0]

    def takes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(native_ops.time, "perf_counter", lambda: now[0])
    arms = {"dense": lambda: takes(6e-3), "reference": lambda: takes(3e-3),
            "native": lambda: takes(2e-3)}  # fmt: skip
    measured = native_ops.measure(Case("sum", "3", "", 0, arms, alike=False), rounds=2)
    assert measured["native_us"] == pytest.approx(2000)
    assert measured["reference_over_native"] == pytest.approx(1.5)
    assert measured["dense_over_native"] == pytest.approx(3)


@needs_library
def test_rows_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "native.csv"
    native_ops.main(["--only", "union", "--rounds", "1", "--out", str(out)])
    rows = read_rows(out, NativeRow)
    assert {(row.op, row.layout) for row in rows} == {("union add", "NCHW"), ("union add", "NHWC")}
    assert all(row.native_us > 0 and row.dense_us is None for row in rows)
    assert "union add" in capsys.readouterr().out


@needs_library
def test_cases_cover_what_the_library_does() -> None:
    found = {case.op.partition(",")[0] for case in cases()}
    assert found == {
        "batch norm", "union add", "gated convolution", "SGD", "AdamW", "gather", "scatter",
    }  # fmt: skip

"""The report is one file that needs no other, with every figure and number in it."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from dcx_kernels.train import figures, figures_groups
from dcx_kernels.train.report import write_report
from dcx_kernels.train.table import COLUMNS, cells, count, size

ARMS = ["dense", "mask", "sparse", "thin"]


def _arm(name: str, **changes: Any) -> dict[str, Any]:
    row = {"arm": name, "accuracy": 0.9725, "accuracy_as_trained": None, "params": 20_035_018}
    row |= {
        "macs": 398_000_000,
        "step_ms": 12.34,
        "selecting_step_ms": None,
        "saved_bytes": 5 * 2**20,
        "steps": 9,
    }
    return {**row, **changes}


def _result() -> dict[str, Any]:
    config = {"selector": "cucb", "density": 0.4, "procedure": "two-stage", "epochs": 2}
    sparse = _arm(
        "sparse", accuracy_as_trained=0.5, selecting_step_ms=15.67, selecting_saved_bytes=2**21
    )
    return {
        "method": "dce",
        "title": "Dynamic channel execution",
        "experiment": {"model": "vgg19", "data": "<digits>"},
        "config": {**config, "batch_size": 32, "recalibrate": True},
        "arms": [_arm("dense"), _arm("mask"), sparse, _arm("thin")],
        "channels": {"features.0": 8, "features.3": 16},
        "final": {"features.0": 2, "features.3": 6},
        "machine": {"processor": "Testium 9000"},
        "versions": {"torch": "2.11.0"},
    }


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        for epoch in range(2):
            for step in range(1, 6):
                at = {"arm": arm, "step": 5 * epoch + step, "epoch": epoch}
                widths = {"widths": {"features.0": 2, "features.3": step}}
                extra = widths if arm in ("mask", "sparse") else {}
                rows.append({**at, "kind": "step", "loss": 1 / step, "step_ms": 2.0, **extra})
            last = {"arm": arm, "kind": "epoch", "epoch": epoch}
            extra = {"widths": {"features.0": 2, "features.3": 6 + epoch}}
            extra["scores"] = {"features.0": 0.3, "features.3": 0.2 * epoch}
            more = extra if arm in ("mask", "sparse") else {}
            rows.append({**last, "test_accuracy": 0.5 + 0.1 * epoch, **more})
    return rows


def test_report_is_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, _result(), _rows())
    page = path.read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 7
    for image in images:
        data = base64.b64decode(image)
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000
    without = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert "http" not in without
    assert "src=" in without
    assert "<script" not in without
    for text in (*COLUMNS, *ARMS, "97.25 %", "20.04 M", "398.00 M", "12.3 ms", "5.0 MiB"):
        assert text in without, text
    for text in (
        "Testium 9000",
        "2.11.0",
        "batch_size",
        "sparse 50.00 %",
        "sparse 15.7 ms and 2.0 MiB",
        "&lt;digits&gt;",
    ):
        assert text in without, text


def test_report_without_recalibration_says_so(tmp_path: Path) -> None:
    result = _result()
    result["config"]["recalibrate"] = False
    write_report(tmp_path / "r.html", result, _rows())
    assert "they were not measured again" in (tmp_path / "r.html").read_text()


def test_report_of_a_method_without_procedures_names_the_method(tmp_path: Path) -> None:
    result = _result()
    result["title"] = "Dynamic channel propagation"
    del result["config"]["procedure"]
    result["arms"][2] = _arm("sparse", accuracy_as_trained=0.5)
    write_report(tmp_path / "r.html", result, _rows())
    page = (tmp_path / "r.html").read_text()
    assert "<h1>Dynamic channel propagation: vgg19 on &lt;digits&gt;</h1>" in page
    assert "selected by cucb at density 0.4; 2 epochs of batches of 32." in page
    assert "while channels changed" not in page  # no step of the kind


def test_figures_with_few_rows_still_draw() -> None:
    arms = [_arm("thin", step_ms=None)]
    for png in (
        figures.accuracy_curves([], ARMS),
        figures.loss_curves([], ARMS),
        figures_groups.channels_over_time([], "sparse", {"a": 3}),
        figures_groups.kept_over_epochs([], "sparse", {"a": 3}),
        figures.cost_bars(arms),
    ):
        assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (999, "999"), (1000, "1.00 k"), (20_035_018, "20.04 M"), (398e6, "398.00 M")],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


def test_cells_without_a_measurement() -> None:
    assert cells(_arm("thin", step_ms=None))[4] == "-"
    assert size(2**20) == "1.0 MiB"

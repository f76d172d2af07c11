"""``dcx train`` from the command to the last file, and through every interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcx_kernels.cli import main
from dcx_kernels.train.log import TIMINGS, read_rows

Arguments = Callable[..., list[str]]
Start = Callable[[list[str]], "subprocess.Popen[str]"]


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def _files(directory: Path) -> dict[str, bytes]:
    paths = sorted(directory.rglob("*.safetensors"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_train_writes_everything_and_prints_one_table(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "run"
    assert main(arguments(out, "--epochs", "1", "--compare", "mask,dense")) == 0
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "checkpoints",
        "log.jsonl",
        "report.html",
        "result.json",
        "thin.onnx",
        "thin.safetensors",
    }
    text = capsys.readouterr().out
    for word in ("test accuracy", "parameters", "MACs", "median step", "saved for backward"):
        assert word in text
    table = [line.split() for line in text.splitlines() if line.startswith("\u2502")]
    assert [row[1] for row in table] == ["dense", "mask", "sparse", "thin"]
    assert "onnxruntime agrees" in text
    assert "sparse epoch   1/1" in text
    assert "recalibrated" in text
    result = json.loads((out / "result.json").read_text())
    assert result["experiment"]["compare"] == ["mask", "dense"]
    assert "vgg19" in (out / "report.html").read_text()


def test_train_of_a_residual_network_whose_stream_shrinks(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    command = arguments(tmp_path, "--epochs", "1", "--model", "resnet20", "--width", "0.5")
    assert main([*command, "--residual", "union"]) == 0
    text = capsys.readouterr().out
    assert "residual union" in text
    assert "onnxruntime agrees" in text
    report = (tmp_path / "report.html").read_text()
    assert '<tr><td>residual</td><td class="text">union</td></tr>' in report
    assert main([*command, "--residual", "tie", "--resume"]) == 2
    assert "of another run: residual: expected 'tie', got 'union'" in capsys.readouterr().err


def test_train_without_onnx_installed_says_so(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dcx_kernels.cli.train.missing_packages", lambda: ["onnx", "onnxscript"])
    assert main(arguments(tmp_path, "--epochs", "1")) == 0
    text = capsys.readouterr().out
    assert "no thin.onnx: onnx and onnxscript not installed (pip install dcx-kernels[onnx])" in text
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "thin.onnx").exists()


def test_train_again_sets_the_earlier_run_aside(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "older.txt").write_text("replaced")
    command = arguments(tmp_path, "--epochs", "1", "--no-onnx")
    for _ in range(2):
        assert main(command) == 0
    assert not (tmp_path / "previous" / "older.txt").exists()
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert _files(tmp_path / "previous") == {
        name: data for name, data in _files(tmp_path).items() if "previous" not in name
    }
    assert len(_rows(tmp_path)) == len(_rows(tmp_path / "previous")) == 10
    assert "moved the earlier run" in capsys.readouterr().out


def test_resume_of_a_finished_run_repeats_no_step(arguments: Arguments, tmp_path: Path) -> None:
    command = arguments(tmp_path, "--epochs", "1", "--no-onnx")
    assert main(command) == 0
    files, rows = _files(tmp_path), _rows(tmp_path)
    assert main([*command, "--resume"]) == 0
    assert _files(tmp_path) == files
    assert _rows(tmp_path) == rows


def test_kill_and_control_c_then_resume_is_exact(
    arguments: Arguments, start: Start, tmp_path: Path
) -> None:
    options = ["--epochs", "6", "--finetune-epochs", "20", "--no-onnx", "--checkpoint-every", "3"]
    straight = start(arguments(tmp_path / "straight", *options))
    out = tmp_path / "broken"
    command = [*arguments(out, *options), "--resume"]

    process = start(command)
    _wait_for_rows(process, out, 9)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "result.json").exists()

    process = start(command)
    _wait_for_rows(process, out, 40)  # in the thin network's training
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted; the same command with --resume continues" in errors
    assert "Traceback" not in errors
    assert not (out / "result.json").exists()

    process = start(command)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    _, errors = straight.communicate()
    assert straight.returncode == 0, errors
    assert _rows(out) == _rows(tmp_path / "straight")
    assert _files(out) == _files(tmp_path / "straight")


def _wait_for_rows(process: subprocess.Popen[str], out: Path, rows: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_rows(out / "log.jsonl")) < rows:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "training does not start"
        time.sleep(0.005)

"""``dcx train --method dcp``, through an interruption, and what belongs to which method."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcx_kernels.cli import main
from dcx_kernels.train.log import TIMINGS, read_rows

Start = Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.fixture
def arguments(data_file: Path) -> Callable[..., list[str]]:
    """Return the arguments of a training that takes seconds."""

    def build(out: Path, *more: str) -> list[str]:
        base = ["train", "--data", str(data_file), "--out", str(out), "--threads", "1"]
        base += ["--model", "vgg16", "--width", "0.0625", "--density", "0.5", "--batch-size", "16"]
        return [*base, "--method", "dcp", "--lr", "0.05", *more]

    return build


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def _files(directory: Path) -> dict[str, bytes]:
    paths = sorted(directory.rglob("*.safetensors"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_train_dcp_writes_everything_and_prints_one_table(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--epochs", "2", "--compare", "mask", "--no-onnx")) == 0
    text = capsys.readouterr().out
    assert "dcp: vgg16 x 0.0625" in text
    assert "132 of 264 channels" in text
    table = [line.split() for line in text.splitlines() if line.startswith("\u2502")]
    assert [row[1] for row in table] == ["mask", "sparse", "thin"]
    assert "not recalibrated" in text
    result = json.loads((out / "result.json").read_text())
    assert (result["method"], result["config"]["selector"]) == ("dcp", "dcp")
    page = (out / "report.html").read_text()
    assert "<h1>Dynamic channel propagation: vgg16" in page
    assert "selected by dcp at density 0.5; 2 epochs" in page
    assert (out / "thin.safetensors").exists()


def test_options_of_dcp_arrive(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    options = ["--epochs", "3", "--milestones", "1,2", "--warmup-epochs", "1", "--decay", "0.5"]
    options += ["--decay-policy", "divide", "--decay-scope", "all", "--initial", "inverse"]
    options += ["--strict", "--recalibrate", "--saliency", "batch", "--no-onnx"]
    assert main(arguments(tmp_path, *options)) == 0
    config = json.loads((tmp_path / "result.json").read_text())["config"]
    expected = {
        "milestones": [1, 2],
        "warmup_epochs": 1,
        "decay": 0.5,
        "decay_policy": "divide",
        "decay_scope": "all",
        "initial": "inverse",
        "strict": True,
        "recalibrate": True,
        "saliency": "batch",
    }
    assert {name: config[name] for name in expected} == expected
    lr = [row["lr"] for row in _rows(tmp_path) if row["kind"] == "epoch"]
    assert lr == pytest.approx([0.05, 0.005, 0.0005])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tau", "3"], "expected --tau with --method dce only, got it with --method dcp"),
        (["--finetune-epochs", "3"], "--finetune-epochs with --method dce only"),
        (["--method", "dce", "--strict"], "--strict with --method dcp only, got it with .*dce"),
        (["--method", "dce", "--warmup-epochs", "0"], "--warmup-epochs with --method dcp only"),
        (["--method", "fbs"], "expected --method to be one of dce, dcp, got fbs"),
        (["--selector", "cucb"], "selector to be one of .*'dcp'.*, got cucb"),
        (["--weights", "nowhere.pt"], "expected trained weights at nowhere.pt: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_of_another_method_is_refused(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(arguments(tmp_path / "out", *options)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dcx train: ")
    assert len(errors.splitlines()) == 1
    assert re.search(message, errors), errors
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_weights_of_the_run_that_is_replaced_are_refused(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = tmp_path / "checkpoints" / "dense" / "latest.safetensors"
    latest.parent.mkdir(parents=True)
    latest.write_bytes(b"trained for days")
    assert main(arguments(tmp_path, "--weights", str(tmp_path))) == 2
    assert "expected --weights outside of --out" in capsys.readouterr().err
    assert latest.read_bytes() == b"trained for days"


def test_export_of_a_dcp_checkpoint(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, now = tmp_path / "run", tmp_path / "now.safetensors"
    assert main(arguments(out, "--epochs", "2", "--no-onnx")) == 0
    saved = out / "checkpoints" / "sparse" / "latest.safetensors"
    assert main(["export", str(saved), "--thin", str(now)]) == 0
    assert now.read_bytes() == (out / "thin.safetensors").read_bytes()
    capsys.readouterr()


def test_control_c_then_resume_is_exact(
    arguments: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    options = ["--epochs", "4", "--warmup-epochs", "1", "--no-onnx"]
    straight = start(arguments(tmp_path / "straight", *options))
    out = tmp_path / "broken"
    command = [*arguments(out, *options), "--resume"]
    process = start(command)
    deadline = time.monotonic() + 120
    while len(read_rows(out / "log.jsonl")) < 7:  # channels are being selected
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "training does not start"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted; the same command with --resume continues" in errors
    assert not (out / "result.json").exists()
    assert main(command) == 0
    _, errors = straight.communicate()
    assert straight.returncode == 0, errors
    assert _rows(out) == _rows(tmp_path / "straight")
    assert _files(out) == _files(tmp_path / "straight")

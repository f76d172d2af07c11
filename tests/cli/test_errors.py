"""Bad input is one clear sentence and exit code 2, never a traceback."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcx_kernels.cli import main
from dcx_kernels.errors import NonFiniteError
from dcx_kernels.train.log import read_rows

Arguments = Callable[..., list[str]]


def _complain(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"dcx {arguments[0]}: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "vgg99"], "vgg99"),
        (["--width", "0"], "width"),
        (["--density", "0"], "density"),
        (["--density", "2"], "density"),
        (["--density", "0.0001"], "min_active"),
        (["--model", "renset20"], "near: resnet20"),
        (["--model", "resnet18"], "resnet18: expected width 1 "),
        (["--model", "vit_b_16", "--width", "1"], "vit_b_16 does not run on images of 32x32"),
        (["--model", "fcn_resnet50", "--width", "1"], "expected logits of shape (2, 4)"),
        (["--residual", "some"], "residual"),
        (["--selector", "best"], "selector"),
        (["--procedure", "no-stage"], "procedure"),
        (["--compare", "mask,dance"], "dance"),
        (["--epochs", "0"], "epochs"),
        (["--batch-size", "0"], "batch_size"),
        (["--batch-size", "5000"], "batch_size"),
        (["--lr", "-1"], "learning rate"),
        (["--tau", "0"], "tau"),
        (["--round-to", "0"], "round_to"),
        (["--device", "toaster"], "toaster"),
        (["--threads", "0"], "--threads"),
        (["--checkpoint-every", "0"], "checkpoint_every"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_bad_options(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert message in _complain(arguments(tmp_path / "run", *options), capsys)


def test_train_data_that_is_damaged(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, train_images=np.zeros((3, 8, 8, 3), np.uint8))
    assert "bad.npz" in _complain(arguments(tmp_path / "run", "--data", str(path)), capsys)
    path.write_bytes(path.read_bytes()[:100])
    assert "bad.npz" in _complain(arguments(tmp_path / "run", "--data", str(path)), capsys)


def test_train_out_is_a_file(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert "to be a directory" in _complain(arguments(tmp_path / "file"), capsys)


def test_resume_from_a_damaged_checkpoint(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tmp_path, "--epochs", "1", "--no-onnx")
    assert main(command) == 0
    path = tmp_path / "checkpoints" / "sparse" / "latest.safetensors"
    data = path.read_bytes()
    capsys.readouterr()
    for damaged in (data[: len(data) // 2], b"", data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        assert "corrupt" in _complain([*command, "--resume"], capsys)
    path.write_bytes(data)
    other = [*arguments(tmp_path, "--epochs", "2", "--no-onnx"), "--resume"]
    assert "of another run: epochs: expected 2, got 1" in _complain(other, capsys)


def test_training_that_breaks_is_exit_code_1(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = _complain(arguments(tmp_path, "--lr", "1e30", "--epochs", "3"), capsys, code=1)
    assert "the state before it is kept and saved in" in message
    assert "step " in message


def test_traceback_on_request(arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        main(arguments(tmp_path, "--lr", "1e30", "--epochs", "3", "--traceback"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "vgg99"], "vgg99"),
        (["inspect", "resnt50"], "near: resnet50"),
        (["inspect", "timm:resnetv51"], "near: timm:"),
        (["inspect", "keras:resnet50"], "expected torchvision:NAME or timm:NAME"),
        (["inspect", "resnet20", "--residual", "some"], "residual 'keep', 'tie' or 'union'"),
        (["inspect", "resnet20", "--grouped", "some"], "grouped 'keep' or 'equal'"),
        (["inspect", "resnet20", "--leaf-module", "x.BatchNorm2d"], "near: torch.nn.modules"),
        (["inspect", "resnet20", "--plot", "widths.doc"], "'widths.doc'"),
        (["inspect", "vgg19", "--density", "0"], "density"),
        (["inspect", "vgg19", "--width", "-1"], "width"),
        (["inspect", "vgg19", "--image-size", "0"], "--image-size"),
        (["inspect", "vgg19", "--image-size", "3"], "does not run on images of 3x3"),
        (["export", "/nowhere", "--onnx", "x.onnx"], "/nowhere"),
        (["export", "/nowhere"], "nothing to write"),
    ],
    ids=str,
)
def test_other_commands_bad_input(
    capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    assert message in _complain(command, capsys)


def test_two_processes_do_not_train_in_one_directory(
    arguments: Arguments,
    start: Callable[[list[str]], subprocess.Popen[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second one stops before it writes anything; the first one is none the worse."""
    out = tmp_path / "run"
    first = start(arguments(out, "--epochs", "200"))
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    line = _complain(arguments(out, "--epochs", "200", "--resume"), capsys)
    assert f"another process is training in {out}" in line
    assert first.poll() is None
    first.kill()
    first.wait()
    rows = read_rows(out / "log.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))  # none is doubled

"""Folders of photographs, curves and downloads, from the command to the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcx_kernels.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own

Arguments = Callable[..., list[str]]


def test_train_on_a_folder_with_curves(arguments: Arguments, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("torchvision")
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / "photos" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (70, 60, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "run"
    more = ["--data", f"folder:{tmp_path}/photos", "--image-size", "40", "--tensorboard"]
    more += ["--model", "m_cifarnet", "--epochs", "1", "--no-onnx"]
    assert main(arguments(out, *more)) == 0
    experiment = json.loads((out / "result.json").read_text())["experiment"]
    assert experiment["image_size"] == 40 and experiment["classes"] == 3
    folders = {path.parent.name for path in (out / "tensorboard").rglob("events*")}
    assert folders == {"sparse", "thin"}


def test_tensorboard_that_is_not_there_is_said_before_anything_is_done(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(arguments(tmp_path / "run", "--tensorboard")) == 2
    assert "dcx train: --tensorboard needs the package tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_download_of_what_cannot_be_downloaded(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", "--data", "digits", "--download")) == 2
    assert "expected svhn:PATH or svhn-train:PATH to download" in capsys.readouterr().err

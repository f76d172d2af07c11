"""``dcx export`` of a run, a thin file and a training checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dcx_kernels.cli import main
from dcx_kernels.graph import load_compact
from dcx_kernels.models import build
from dcx_kernels.train import checkpoint


@pytest.fixture(scope="module")
def run(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    options = ["--width", "0.0625", "--density", "0.5", "--batch-size", "16", "--epochs", "1"]
    command = ["train", "--data", str(data_file), "--out", str(out), "--no-onnx", *options]
    assert main([*command, "--compare", "dense"]) == 0
    return out


def test_export_of_a_run_directory_and_its_thin_file(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    assert main(["export", str(run), "--onnx", str(tmp_path / "a.onnx")]) == 0
    assert main(["export", str(run / "thin.safetensors"), "--onnx", str(tmp_path / "b.onnx")]) == 0
    assert (tmp_path / "a.onnx").stat().st_size == (tmp_path / "b.onnx").stat().st_size > 10_000


def test_export_of_a_thin_file_elsewhere_needs_its_network(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    thin, onnx = tmp_path / "thin.safetensors", tmp_path / "x.onnx"
    shutil.copy(run / "thin.safetensors", thin)
    command = ["export", str(thin), "--onnx", str(onnx)]
    assert main(command) == 2
    assert "give --model, --width, --classes" in capsys.readouterr().err
    network = ["--model", "vgg19", "--width", "0.0625", "--classes"]
    assert main([*command, *network, "7"]) == 2
    assert "thin.safetensors" in capsys.readouterr().err
    assert main([*command, *network, "4"]) == 0
    assert onnx.exists()


def test_export_of_a_sparse_checkpoint_is_its_final_selection(run: Path, tmp_path: Path) -> None:
    source = run / "checkpoints" / "sparse" / "latest.safetensors"
    thin = tmp_path / "now.safetensors"
    assert main(["export", str(source), "--thin", str(thin)]) == 0
    network = load_compact(thin, build("vgg19", 4, width=1 / 16))
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sum(norm.num_features for norm in norms) == 172
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_export_of_a_thin_training_checkpoint(run: Path, tmp_path: Path) -> None:
    source = run / "checkpoints" / "thin" / "latest.safetensors"
    thin = tmp_path / "thin.safetensors"
    assert main(["export", str(source), "--thin", str(thin)]) == 0
    wanted = load_compact(run / "thin.safetensors", build("vgg19", 4, width=1 / 16))
    got = load_compact(thin, build("vgg19", 4, width=1 / 16))
    assert all(
        torch.equal(a, b)
        for a, b in zip(wanted.state_dict().values(), got.state_dict().values(), strict=True)
    )


def test_export_refuses_what_has_no_thin_form(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = str(tmp_path / "x.onnx")
    dense = run / "checkpoints" / "dense" / "latest.safetensors"
    assert main(["export", str(dense), "--onnx", onnx]) == 2
    assert "it has no thin form" in capsys.readouterr().err
    assert main(["export", str(run), "--thin", str(tmp_path / "y")]) == 2
    assert "is a thin checkpoint already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--onnx", onnx]) == 2
    assert "train has not finished" in capsys.readouterr().err
    (tmp_path / "junk").write_bytes(b"junk")
    assert main(["export", str(tmp_path / "junk"), "--onnx", onnx]) == 2
    assert "no safetensors file" in capsys.readouterr().err
    checkpoint.save(tmp_path / "foreign", {"config": {}, "model": {}, "selector": None})
    assert main(["export", str(tmp_path / "foreign"), "--onnx", onnx]) == 2
    assert "was not written by dcx train" in capsys.readouterr().err

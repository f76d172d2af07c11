"""``dcx export`` of a run, a thin file and a training checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import fx

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


@pytest.fixture(scope="module")
def union_run(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose thin network is a graph: sums of unlike branches."""
    out = tmp_path_factory.mktemp("union")
    torch.set_num_threads(1)
    options = ["--model", "resnet20", "--width", "0.5", "--residual", "union", "--lr", "0.01"]
    more = ["--density", "0.5", "--batch-size", "16", "--epochs", "1", "--no-onnx"]
    assert main(["train", "--data", str(data_file), "--out", str(out), *options, *more]) == 0
    return out


def test_export_of_a_thin_graph_is_one_onnx_file(
    union_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "onnx" / "thin.onnx"
    assert main(["export", str(union_run), "--onnx", str(path)]) == 0
    text = capsys.readouterr().out
    assert "onnxruntime agrees" in text
    source = union_run / "checkpoints" / "thin" / "latest.safetensors"
    assert main(["export", str(source), "--thin", str(tmp_path / "same")]) == 0
    assert _table(capsys.readouterr().out) == _table(text)
    assert list(path.parent.iterdir()) == [path]
    thin = load_compact(union_run / "thin.safetensors", build("resnet20", 4, width=0.5))
    assert isinstance(thin, fx.GraphModule)
    images = torch.randn(5, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(path))
    got = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(got, thin(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["sparse", "thin"])
def test_export_of_a_checkpoint_with_sums_of_unlike_branches(
    union_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    source = union_run / "checkpoints" / stage / "latest.safetensors"
    assert main(["export", str(source), "--thin", str(tmp_path / "now.safetensors")]) == 0
    network = load_compact(tmp_path / "now.safetensors", build("resnet20", 4, width=0.5))
    finished = load_compact(union_run / "thin.safetensors", build("resnet20", 4, width=0.5))
    assert isinstance(network, fx.GraphModule)
    assert network.state_dict().keys() == finished.state_dict().keys()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():  # the sparse stage is what the thin one began with
        assert torch.equal(network(images), finished(images)) == (stage == "thin")
    result = json.loads((union_run / "result.json").read_text())
    assert sum(p.numel() for p in network.parameters()) == result["arms"][-1]["params"]
    capsys.readouterr()


def _table(text: str) -> str:
    return text[text.index("widths, and cost of one image of 32x32") :]


def test_export_prints_widths_and_cost(
    union_run: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory in (union_run, run):
        source = directory / "checkpoints" / "thin" / "latest.safetensors"
        assert main(["export", str(source), "--thin", str(tmp_path / "x")]) == 0
        table = _table(capsys.readouterr().out)
        total = next(line for line in table.splitlines() if line.startswith("  total"))
        part, whole = (float(number) for number in total.split()[1].split("/"))
        arm = json.loads((directory / "result.json").read_text())["arms"][-1]
        assert part == pytest.approx(arm["params"] / 1e3, abs=0.01)
        assert part < whole
        widths = json.loads((directory / "result.json").read_text())["final"]
        rows = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
        for name, width in widths.items():
            assert rows[name][2].split("/")[0] == str(width)


def test_export_of_images_that_do_not_fit(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (run, run / "checkpoints" / "thin" / "latest.safetensors"):
        onnx = str(tmp_path / "x.onnx")
        assert main(["export", str(source), "--onnx", onnx, "--image-size", "8"]) == 2
        assert "vgg19 does not run on images of 8x8" in capsys.readouterr().err


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

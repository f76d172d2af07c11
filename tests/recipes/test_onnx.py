"""One ONNX file that onnxruntime and PyTorch agree on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph import compact, convert
from dcx_kernels.graph.thin import ThinModule
from dcx_kernels.models import build
from dcx_kernels.recipes import onnx


def test_export_is_one_file_with_a_dynamic_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build("vgg16", 3, width=1 / 16)
    path = tmp_path / "out" / "thin.onnx"
    training = model.training
    assert "onnxruntime agrees" in onnx.export_onnx(model, torch.randn(1, 3, 32, 32), path)
    assert list(path.parent.iterdir()) == [path]
    assert model.training == training
    session = onnxruntime.InferenceSession(str(path))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = model.eval()(images)
    got = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class _Residual(nn.Module):
    """Its graph of training differs from that of evaluation: torch.fx bakes the mode in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4)."""
        x = self.stem(x).relu()
        x = F.dropout((x + self.branch(x)).relu().mean((2, 3)), 0.5, self.training)
        return self.head(x)


def test_export_of_a_thin_network_with_two_graphs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = torch.randn(1, 3, 8, 8)
    model = convert(_Residual(), images, "union")
    model.set_active({"stem": ChannelSet([0, 2, 5], 8), "branch": ChannelSet([1, 2], 8)})
    thin = compact(model)
    assert isinstance(thin, ThinModule)
    assert "onnxruntime agrees" in onnx.export_onnx(thin, images, tmp_path / "thin.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["thin.onnx"]


def test_export_says_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ONNX export needs onnx and onnxscript: pip install"):
        onnx.export_onnx(nn.Identity(), torch.zeros(1, 3, 4, 4), tmp_path / "x.onnx")


def test_export_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * self.factor

    original = onnx._check

    def changed(model: nn.Module, images: Tensor, path: Path) -> str:
        wrong = Scale()
        wrong.factor.data.fill_(2.1)
        return original(wrong, images, path)

    monkeypatch.setattr(onnx, "_check", changed)
    with pytest.raises(ValueError, match="onnxruntime disagrees"):
        onnx.export_onnx(Scale(), torch.rand(1, 3, 4, 4), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())

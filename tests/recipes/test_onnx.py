"""One ONNX file that onnxruntime and PyTorch agree on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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

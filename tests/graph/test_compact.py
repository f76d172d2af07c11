"""The thin network is the selection, exactly, as plain torch; and so it comes back from disk."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import dcx_kernels as dcx
from dcx_kernels.graph.compact import shrink_
from dcx_kernels.graph.compact_io import read_manifest
from dcx_kernels.models import vgg19
from networks import NETWORKS, Chain, Residual, batch, random_sets
from tolerances import RELATIVE, assert_exact, assert_gradients_close


def trained(
    network: str, execution: str = "sparse"
) -> tuple[nn.Module, dcx.ChannelModel, torch.Tensor]:
    """Return the dense network, its converted twin after two steps, and a batch."""
    dense, x, t = batch(network)
    model = dcx.convert(dense, x, execution=execution)
    optimizer = dcx.optim.SGD(model, lr=0.05, momentum=0.9)
    for _ in range(2):
        model.set_active(random_sets(model))
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    return dense, model, x


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_compact_logits_equal_the_converted_model(network: str, execution: str) -> None:
    dense, model, x = trained(network, execution)
    thin = dcx.compact(model.eval())
    plain = network != "branches"  # chunks and shuffles of compact tensors need a graph
    assert (type(thin) is type(dense)) == plain and not thin.training
    assert not any(type(m).__module__.startswith("dcx_kernels.nn") for m in thin.modules())
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        expected = model(x)
        assert_gradients_close({"y": thin(x)}, {"y": expected}, RELATIVE)
        single = copy.deepcopy(thin).float()(x.float())
        torch.testing.assert_close(single, model.float()(x.float()), rtol=1e-5, atol=1e-5)


def test_compact_is_a_copy_with_the_models_mode() -> None:
    _, model, _ = trained("vgg19")
    thin = dcx.compact(model.train())
    assert thin.training
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in (*thin.parameters(), *thin.buffers()):
            tensor.zero_()
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, before[name], name)


def test_compact_trains_as_the_sparse_model_does() -> None:
    """One step of the thin network equals one sparse step with the same sets."""
    _, model, x = trained("vgg19")
    t = torch.randint(0, 5, (x.shape[0],))
    thin = dcx.compact(model)
    dcx_optimizer = dcx.optim.SGD(model, lr=0.1)
    optimizer = torch.optim.SGD(thin.parameters(), lr=0.1)
    for network, opt in ((model, dcx_optimizer), (thin, optimizer)):
        opt.zero_grad()
        F.cross_entropy(network(x), t).backward()
        opt.step()
    again = dcx.compact(model)
    assert_gradients_close(dict(thin.named_parameters()), dict(again.named_parameters()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own exporter uses it
def test_thin_network_survives_export_and_onnx(tmp_path: Path) -> None:
    _, model, x = trained("vgg19")
    thin, x = dcx.compact(model).eval().float(), x.float()
    with torch.no_grad():
        expected = thin(x)
    dims = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(thin, (x,), dynamic_shapes=dims)
    torch.testing.assert_close(exported.module()(x[:3]), expected[:3], rtol=1e-5, atol=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "thin.onnx"
    program = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert program is not None
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x[:5].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected[:5], rtol=1e-4, atol=1e-5)


def test_save_and_load_compact_round_trip(tmp_path: Path) -> None:
    _, model, x = trained("chain")
    path = tmp_path / "deep" / "thin.safetensors"
    dcx.save_compact(model, path)
    again = dcx.load_compact(path, Chain().double())
    thin = dcx.compact(model).eval()
    assert not again.training
    for name, tensor in thin.state_dict().items():
        assert_exact(again.state_dict()[name], tensor, name)
    assert_exact(again(x), thin(x))
    active = read_manifest(path)["active"]
    assert active == {name: s.indices.tolist() for name, s in model.active.items()}
    dcx.save_compact(thin, path, active=model.active)
    assert_exact(dcx.load_compact(path, Chain().double())(x), thin(x))
    assert [p.name for p in path.parent.iterdir()] == ["thin.safetensors"]


class TestLoadErrors:
    """A file that is not what it should be is refused with a sentence."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        model = dcx.convert(Chain(), torch.zeros(2, 3, 9, 9))
        dcx.save_compact(model, tmp_path / "thin.safetensors")
        return tmp_path / "thin.safetensors"

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(dcx.CheckpointError, match="expected a thin model file, got nothing"):
            dcx.load_compact(tmp_path / "no.safetensors", Chain())

    @pytest.mark.parametrize("keep", [0, 7, 200, -10])
    def test_truncated(self, path: Path, keep: int) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(dcx.CheckpointError, match="not a readable safetensors file"):
            dcx.load_compact(path, Chain())

    def test_another_file(self, path: Path) -> None:
        save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(dcx.CheckpointError, match=r"expected format dcx_kernels\.compact/1"):
            dcx.load_compact(path, Chain())

    def test_another_architecture(self, path: Path) -> None:
        for other in (Residual(), vgg19(width=1 / 16)):
            with pytest.raises(dcx.CheckpointError, match=r"expected a thin .*got another model"):
                dcx.load_compact(path, other)

    def test_widths_that_disagree_with_the_weights(self, path: Path) -> None:
        manifest = read_manifest(path)
        manifest["widths"]["stem"] = [3, 5]  # type: ignore[index]
        save_file(load_file(path), path, metadata={"dcx": json.dumps(manifest)})
        with pytest.raises(dcx.CheckpointError, match=r"size mismatch for stem\.weight"):
            dcx.load_compact(path, Chain())

    def test_disk_full_keeps_the_previous_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(dcx.CheckpointError, match=r"not written .*No space left"):
            dcx.save_compact(dcx.convert(Chain(), torch.zeros(2, 3, 9, 9)), path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_shrink_refuses_before_it_changes_anything() -> None:
    network = Residual()
    for widths, message in (
        ({"free": (8, 3), "nowhere": (1, 1)}, r"expected a conv, linear or batch norm .*'nowhere'"),
        ({"free": (8, 3), "back": (12, 9)}, r"back: .*up to \(12, 8\), got \(12, 9\)"),
        ({"free": (8, 0)}, r"free: .*got \(8, 0\)"),
        ({"grouped": (6, 8)}, r"grouped: .*widths that 4 groups of \(8, 8\) can have"),
    ):
        with pytest.raises(ValueError, match=message):
            shrink_(network, widths)
    assert network.free.weight.shape[0] == 10

"""Channels that nobody chose are cut; what one image touches, by hand and against Table 3."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.models import m_cifarnet, resnet20
from tolerances import assert_exact, assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")


def gated(name: str, density: float = 0.4) -> dcx.FBSModel:
    """Convert a small network whose gates shut many channels for good."""
    torch.manual_seed(1)
    dense = {
        "m_cifarnet": lambda: m_cifarnet(width=1 / 8),
        "resnet20-pad": lambda: resnet20(width=0.5),
        "resnet20-conv": lambda: resnet20(width=0.5, shortcut="conv"),
        "torchvision": lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5
        ),
    }[name]().double()
    model = dcx.convert_fbs(dense, density=density)
    with torch.no_grad():
        for layer in model.gated.values():
            layer.rho[::2] = -1e3  # never positive
            layer.norm.momentum = None
        model.train()
        for _ in range(3):
            model(images(8))
    return model.eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("name", ["m_cifarnet", "resnet20-pad", "resnet20-conv", "torchvision"])
def test_cut_network_is_the_same_function(name: str) -> None:
    model, batches = gated(name), [images(5), images(2)]
    before = {n: p.clone() for n, p in model.state_dict().items()}
    counts = dcx.count_winners(model, batches)
    small = dcx.cut_unused(model, counts)
    with torch.no_grad():
        for batch in batches:
            assert_gradients_close({"logits": small(batch)}, {"logits": model(batch)})
    for layer, old in zip(small.gated.values(), model.gated.values(), strict=True):
        assert layer.num_winners == min(old.num_winners, layer.out_channels)
        assert layer.phi.shape == (layer.out_channels, layer.in_channels)
    widths = [layer.out_channels for layer in small.gated.values()]
    assert sum(widths) < sum(layer.out_channels for layer in model.gated.values())
    for n, p in model.state_dict().items():
        assert_exact(p, before[n], n)
    # nothing is left to be cut, and it still trains
    again = dcx.cut_unused(small, dcx.count_winners(small, batches))
    assert [layer.out_channels for layer in again.gated.values()] == widths
    small.train()(batches[0]).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())


def test_only_channels_chosen_nowhere_are_cut() -> None:
    model = gated("m_cifarnet")
    counts = dcx.count_winners(model, [images(6)])
    small = dcx.cut_unused(model, counts)
    for name, layer in small.gated.items():
        used = counts[name] > 0
        assert layer.out_channels == int(used.sum())
        assert_exact(layer.rho.detach(), model.gated[name].rho.detach()[used])
    assert small.classifier.in_features == small.gated["features.conv7"].out_channels  # type: ignore[union-attr]


def test_a_channel_of_a_sum_stays_if_one_term_chose_it() -> None:
    model = gated("resnet20-conv")
    stream = ["conv1", *(f"layer1.{i}.conv2" for i in range(3))]
    with torch.no_grad():
        model.gated["layer1.1.conv2"].rho.fill_(5.0)  # chooses channels that others never do
    counts = dcx.count_winners(model, [images(4)])
    small = dcx.cut_unused(model, counts)
    used = torch.stack([counts[name] for name in stream]).sum(0) > 0
    for name in stream:
        assert small.gated[name].out_channels == int(used.sum())


def test_zeros_that_become_something_are_not_cut() -> None:
    class Sigmoid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.b, self.b_norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.norm(self.a(x)))
            return self.b_norm(self.b(x)).relu().mean((2, 3))

    model = dcx.convert_fbs(Sigmoid().double(), density=0.5).eval()
    with torch.no_grad():
        for layer in model.gated.values():
            layer.rho[::2] = -1e3
    x = images(3)
    small = dcx.cut_unused(model, dcx.count_winners(model, [x]))
    assert small.gated["a"].out_channels == 6 and small.gated["b"].in_channels == 6
    assert_gradients_close({"y": small(x)}, {"y": model(x)})


@pytest.mark.parametrize("name", ["m_cifarnet", "resnet20-pad"])
def test_what_is_left_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = gated(name), images(4)
    small = dcx.cut_unused(model, dcx.count_winners(model, [x]))
    torch.save(small.state_dict(), tmp_path / "small.pt")
    state = torch.load(tmp_path / "small.pt", weights_only=True)
    for loaded in (gated(name, density=1.0), small):  # one that is whole, one that is cut alike
        assert loaded.load_state_dict(state).missing_keys == []
        with torch.no_grad():
            assert_exact(loaded(x), small(x), "logits")
    widths = [layer.out_channels for layer in small.gated.values()]
    assert [layer.out_channels for layer in loaded.gated.values()] == widths
    # what was loaded is cut again by its own numbers
    with torch.no_grad():
        list(loaded.gated.values())[1].rho[0] = -1e3  # in no sum
    again = dcx.cut_unused(loaded, dcx.count_winners(loaded, [x]))
    assert int(again.left.sum()) < int(small.left.sum())
    with torch.no_grad():
        assert_gradients_close({"logits": again(x)}, {"logits": loaded(x)})
    small.load_state_dict(again.state_dict())


def test_channels_that_are_gone_cannot_be_loaded() -> None:
    model = gated("m_cifarnet")
    small = dcx.cut_unused(model, dcx.count_winners(model, [images(4)]))
    before = {n: t.clone() for n, t in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"no channels but the \d+ left here, got 148"):
        small.load_state_dict(model.state_dict())
    other = dcx.convert_fbs(m_cifarnet(width=1 / 16).double())
    with pytest.raises(ValueError, match=r"148 channel numbers of this network, got 80"):
        small.load_state_dict(other.state_dict())
    for n, t in small.state_dict().items():
        assert_exact(t, before[n], n)


def test_counts_must_fit() -> None:
    model = gated("m_cifarnet")
    with pytest.raises(ValueError, match=r"features.conv0: expected counts of shape \(8,\), got N"):
        dcx.cut_unused(model, {})


def test_counting_leaves_no_trace() -> None:
    model = gated("m_cifarnet").train()
    state = copy.deepcopy(model.state_dict())
    dcx.count_winners(model, [images(2)])
    assert all(module.training for module in model.modules())
    assert not any(layer._forward_hooks for layer in model.gated.values())
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)


# --- what one image touches -----------------------------------------------------------------------


def test_memory_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
    )  # fmt: skip
    model = dcx.convert_fbs(nn.Sequential(net, nn.AdaptiveAvgPool2d(1)), density=0.5)
    with torch.no_grad():
        for layer in model.gated.values():
            layer.phi.zero_()
        model.gated["0.3"].rho[1:] = 0  # one winner has an open gate, two have a shut one
    x = torch.rand(2, 3, 5, 5)
    cost = dcx.memory_access(model, [x])
    assert cost.layers == {"0.0": (3, 2), "0.3": (2, 1)}
    # 25 and 4 pixels; float32
    assert cost.weight_bytes == 4 * (3 * 2 + 2 * 1 * 9)
    assert cost.activation_bytes == 4 * (3 * 25 + 2 * 25 + 2 * 25 + 1 * 4)
    assert cost.gate_bytes == 4 * (3 * 4 + 2 * 6)
    assert cost.macs == 25 * 3 * 2 + 4 * 2 * 1 * 9
    assert cost.peak_bytes == 4 * (3 * 2 + 3 * 25 + 2 * 25)
    # in a batch samples choose other filters: all are held
    assert dcx.memory_access(model, [x], batch=8).peak_bytes == 4 * (12 + 8 * (75 + 50))
    dense = dcx.memory_access(model, [x], dense=True)
    assert dense.macs == 25 * 3 * 4 + 4 * 4 * 6 * 9
    with pytest.raises(ValueError, match="at least one image, got 0"):
        dcx.memory_access(model, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "weights", "activations", "peak", "cloud"),
    [
        (torchvision.models.vgg16_bn, 56.2, 86.5, 24.6, 3.09),
        # weights are printed with the classifier's 2.0 MB
        (torchvision.models.resnet18, 44.6 - 2.0, 17.8, 9.19, 0.47),
    ],
    ids=["vgg16", "resnet18"],
)
def test_dense_columns_of_table_3(
    make: object, weights: float, activations: float, peak: float, cloud: float
) -> None:
    model = dcx.convert_fbs(make(), torch.zeros(1, 3, 64, 64))  # type: ignore[operator]
    x = torch.zeros(1, 3, 224, 224)
    one = dcx.memory_access(model, [x], dense=True)
    mb = 2**20
    assert one.weight_bytes / mb == pytest.approx(weights, rel=0.01)
    assert one.activation_bytes / mb == pytest.approx(activations, rel=0.01)
    assert one.peak_bytes / mb == pytest.approx(peak, rel=0.01)
    many = dcx.memory_access(model, [x], batch=128, dense=True)
    assert many.peak_bytes / mb / 1000 == pytest.approx(cloud, rel=0.03)


def test_macs_of_table_4() -> None:
    """The paper's M-CifarNet at d = 0.5: 44.3 M MACs, layer by layer."""
    model = dcx.convert_fbs(m_cifarnet(), density=0.5).eval()
    with torch.no_grad():
        for layer in model.gated.values():  # all gates open
            layer.phi.abs_()
    cost = dcx.memory_access(model, [torch.rand(1, 3, 32, 32)])
    assert cost.macs / 1e6 == pytest.approx(44.3, abs=0.7)
    full = dcx.memory_access(model, [torch.rand(1, 3, 32, 32)], dense=True)
    assert full.macs / 1e6 == pytest.approx(174.3, abs=0.1)

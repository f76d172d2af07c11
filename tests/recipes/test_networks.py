"""Networks by name, and sentences where one does not fit."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcx_kernels.graph import ChannelGroup
from dcx_kernels.models import MODELS, VGG
from dcx_kernels.recipes.networks import build_network, check_runs, check_trains, known_names
from dcx_kernels.recipes.stages import first_channels


def test_our_own_names_come_first() -> None:
    pytest.importorskip("torchvision")
    assert isinstance(build_network("vgg16", 4, 1 / 16), VGG)
    other = build_network("torchvision:mobilenet_v2", 4)
    assert type(other).__module__.startswith("torchvision.")
    names = known_names()
    assert names[: len(MODELS)] == list(MODELS)
    assert len(names) == len(set(names))
    assert {"resnet50", "densenet121", "fcn_resnet50"} < set(names)


def test_timm_needs_its_name() -> None:
    pytest.importorskip("timm")
    network = build_network("timm:resnet10t", 6)
    assert type(network).__module__.startswith("timm.")
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 6)


def test_auxiliary_classifiers_are_left_out() -> None:
    pytest.importorskip("torchvision")
    network = build_network("googlenet", 3)
    assert isinstance(network.train()(torch.zeros(2, 3, 32, 32)), Tensor)


def test_segmentation_networks_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    network = build_network("lraspp_mobilenet_v3_large", 3)
    assert isinstance(check_runs(network, torch.zeros(1, 3, 32, 32), "x"), dict)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg99", (4,), "a model out of m_cifarnet, .*, or of torchvision, or timm:NAME, got 'vgg"),
        ("densnet121", (4,), "near: densenet121"),
        ("zzzzzzzzzz", (4,), "got 'zzzzzzzzzz'$"),
        ("keras:resnet50", (4,), "expected torchvision:NAME or timm:NAME, got 'keras:resnet50'"),
        ("torchvision:resnet20", (4,), "near: torchvision:resnet"),
        ("resnet18", (4, 0.5), "resnet18: expected width 1 .*, got 0.5"),
        ("resnet18", (0,), "resnet18: expected num_classes of at least 1, got 0"),
    ],
)
def test_refusals(name: str, options: tuple[Any, ...], message: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=message):
        build_network(name, *options)


def test_libraries_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'timm:resnet18' needs timm: pip install timm"):
        build_network("timm:resnet18", 4)
    with pytest.raises(ValueError, match="torchvision is not installed"):
        build_network("resnet50", 4)
    assert isinstance(build_network("vgg16", 4, 1 / 16), VGG)


class _Strange(nn.Module):
    """Logits while it evaluates, a tuple while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        """Return (N, 3)."""
        logits = self.norm(x).mean((2, 3))
        return (logits, logits) if self.training else logits


def test_check_trains_leaves_the_network_alone() -> None:
    network, example = build_network("resnet20", 4, 0.25), torch.randn(1, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check_trains(network, example, 4, "resnet20")
    assert network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    with pytest.raises(ValueError, match=r"expected logits of shape \(2, 5\), got \(2, 4\)"):
        check_trains(network, example, 5, "resnet20")
    with pytest.raises(ValueError, match=r"strange: expected logits of .*, got tuple"):
        check_trains(_Strange(), example, 3, "strange")
    vgg = build_network("vgg16", 4, 1 / 16)
    with pytest.raises(ValueError, match="vgg16 does not run on images of 8x8: "):
        check_trains(vgg, example[..., :8, :8], 4, "vgg16")


def test_first_channels_respect_runs() -> None:
    groups = {
        "plain": ChannelGroup(10, ()),
        "grouped": ChannelGroup(12, (), runs=3),
        "full": ChannelGroup(5, (), selectable=False, reason="output"),
    }
    sets = first_channels(groups, 0.5)
    assert {n: s.indices.tolist() for n, s in sets.items()} == {
        "plain": [0, 1, 2, 3, 4],
        "grouped": [0, 1, 4, 5, 8, 9],
    }
    least = first_channels(groups, 0.1, min_active=4)["grouped"]
    assert least.indices.tolist() == [0, 1, 4, 5, 8, 9]  # 4 over 3 runs: 2 of each

"""VGG against the numbers the papers print."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcx_kernels.models import MODELS, build, vgg16, vgg19


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def convs(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def macs(model):
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


def test_vgg19_is_the_papers_network():
    model = vgg19()
    assert num_parameters(model) == 20_035_018
    assert macs(model) == pytest.approx(3.98e8, rel=1.5e-3)
    widths = [m.out_channels for m in convs(model).values()]
    assert widths == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert sum(widths) == 5504
    assert all(m.bias is None for m in convs(model).values())


def test_vgg19_names():
    model = vgg19()
    assert list(convs(model))[:5] == [f"features.{i}" for i in (0, 3, 7, 10, 14)]
    assert isinstance(model.features, nn.Sequential)
    assert isinstance(model.classifier, nn.Linear)
    assert {"features.0.weight", "features.1.running_var", "classifier.bias"} <= set(
        model.state_dict()
    )


def test_vgg19_on_100_classes_is_the_papers_size():
    assert num_parameters(vgg19(100)) == pytest.approx(20.08e6, rel=1e-4)


def test_vgg16_is_the_papers_network():
    model = vgg16()
    widths = [m.out_channels for m in convs(model).values()]
    assert widths == [64, 64, 128, 128, 256, 256, 256] + [512] * 6
    assert num_parameters(model) == 14_724_042
    assert macs(model) == pytest.approx(3.13e8, rel=2e-3)


@pytest.mark.parametrize("size", [32, 48, 63])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_forward_shape(name, size):
    model = build(name, 7, width=0.1).eval()
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_width_rounds_and_keeps_one_channel():
    widths = [m.out_channels for m in convs(vgg19(width=0.3)).values()]
    assert widths == [19] * 2 + [38] * 2 + [77] * 4 + [154] * 8
    assert {m.out_channels for m in convs(vgg16(width=0.001)).values()} == {1}


def test_initialisation():
    torch.manual_seed(0)
    model = vgg19()
    conv = model.features[7]  # 64 -> 128: fan-in and fan-out differ
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(model.features[1].weight, torch.ones(64))
    assert not model.features[1].bias.any()
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert not model.classifier.bias.any()


def test_build_names_the_known_models():
    with pytest.raises(
        ValueError, match=r"a model out of m_cifarnet, .*vgg16, vgg19.*, got 'vgg11'"
    ):
        build("vgg11", 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "vgg19: expected a positive width, got 0"),
        ({"width": float("nan")}, "a positive width, got nan"),
        ({"num_classes": 0}, "num_classes of at least 1, got 0"),
    ],
)
def test_vgg_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        vgg19(**options)

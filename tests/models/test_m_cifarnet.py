"""M-CifarNet against Table 4 of feature boosting and suppression."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import dcx_kernels as dcx
from dcx_kernels.models import MCifarNet, build, m_cifarnet
from tolerances import assert_exact, assert_gradients_close

PADDINGS = ["symmetric", "same"]
WIDTHS = [64, 64, 128, 128, 128, 192, 192, 192]
EXTENTS = [30, 30, 15, 15, 15, 8, 8, 8]
# millions; conv0 (1.555) and conv5 (14.156) are printed cut off, the others rounded
PRINTED_MACS = [1.5, 33.2, 16.6, 33.2, 33.2, 14.1, 21.2, 21.2]


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def convs(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def macs(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("padding", PADDINGS)
def test_it_is_the_papers_network(padding):
    """1.30 M parameters settle batch norm's affine: 1.294 M without it, with a bias alone 1.295 M.

    A bias of the convolutions (1.297 M) would print alike; behind batch norm it has no effect.
    """
    model = m_cifarnet(padding=padding)
    assert num_parameters(model) == 1_296_074
    assert macs(model) == 174_301_824  # printed 174.3 M
    assert [m.out_channels for m in convs(model).values()] == WIDTHS
    assert all(m.bias is None for m in convs(model).values())


@pytest.mark.parametrize("padding", PADDINGS)
def test_layers_are_the_papers(padding):
    model, shapes = m_cifarnet(padding=padding).eval(), []
    for conv in convs(model).values():
        conv.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, k, p, p) for k, p in zip(WIDTHS, EXTENTS, strict=True)]
    layers = [c for c in dcx.cost(model, torch.zeros(1, 3, 32, 32)).layers if "conv" in c.name]
    for layer, printed in zip(layers, PRINTED_MACS, strict=True):
        in_millions = layer.macs / 1e6
        assert printed in (round(in_millions, 1), int(in_millions * 10) / 10)


def test_widths_of_network_slimming_cost_what_the_paper_prints():
    slim = MCifarNet([52, 64, 123, 128, 128, 182, 111, 192])
    assert int(macs(slim) / 1e5) / 10 == 146.5


def test_names():
    model = m_cifarnet(padding="same", dropout=0.5)
    assert list(convs(model)) == [f"features.conv{i}" for i in range(8)]
    keys = set(m_cifarnet().state_dict())
    assert {"features.conv0.weight", "features.norm7.running_var", "classifier.bias"} <= keys
    assert set(model.state_dict()) == keys  # options change no key


def same_padding(x, stride):
    """Pad for a 3x3 filter as TensorFlow's 'SAME': what is left over goes below and right."""
    sides = []
    for extent in (x.shape[3], x.shape[2]):
        total = max((-(-extent // stride) - 1) * stride + 3 - extent, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


@pytest.mark.parametrize("size", [32, 36])
@torch.no_grad()
def test_same_pads_as_tensorflow_does(size):
    model = m_cifarnet(width=0.25, padding="same").double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    y = x
    for i, conv in enumerate(convs(model).values()):
        stride = 2 if i in (2, 5) else 1
        y = F.conv2d(y if i == 0 else same_padding(y, stride), conv.weight, stride=stride)
        y = F.relu(model.features.get_submodule(f"norm{i}")(y))
    y = model.classifier(y.mean((2, 3)))
    assert_gradients_close({"y": model(x)}, {"y": y})


@torch.no_grad()
def test_paddings_differ():
    symmetric, same = m_cifarnet(width=0.25).eval(), m_cifarnet(width=0.25, padding="same").eval()
    same.load_state_dict(symmetric.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(symmetric(x), same(x))


def test_dropout_stands_behind_conv3_and_conv6():
    names = [name for name, _ in m_cifarnet(dropout=0.5).features.named_children()]
    assert [n for n in names if "dropout" in n] == ["dropout3", "dropout6"]
    assert names[names.index("dropout3") - 1] == "relu3"
    assert m_cifarnet(dropout=0.25).features.dropout6.p == 0.25
    assert not any(isinstance(m, nn.Dropout) for m in m_cifarnet().modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", PADDINGS)
def test_fx_traces_it(padding, training):
    model = m_cifarnet(width=0.25, padding=padding, dropout=0.5).train(training)
    traced = fx.symbolic_trace(model)
    outputs = []
    for network in (model, traced):
        torch.manual_seed(0)  # dropout draws the same
        with torch.no_grad():
            outputs.append(network(torch.ones(2, 3, 32, 32)))
    assert_exact(outputs[1], outputs[0])


def test_state_carries_the_network():
    model, other = m_cifarnet(width=0.25), m_cifarnet(width=0.25)
    x = torch.randn(4, 3, 32, 32)
    model(x)  # moves the running statistics
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_exact(other.eval()(x), model.eval()(x))


def test_initialisation():
    torch.manual_seed(0)
    model = m_cifarnet()
    conv = model.features.conv5  # 128 -> 192: fan-in and fan-out differ
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (192 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(model.features.norm0.weight, torch.ones(64))
    assert not model.classifier.bias.any()


def test_width_rounds_and_keeps_one_channel():
    widths = [m.out_channels for m in convs(m_cifarnet(width=0.3)).values()]
    assert widths == [19, 19, 38, 38, 38, 58, 58, 58]
    assert {m.out_channels for m in convs(m_cifarnet(width=0.001)).values()} == {1}


@pytest.mark.parametrize("padding", PADDINGS)
def test_every_conv_is_selectable(padding):
    """Feature boosting and suppression gates all eight."""
    model = dcx.convert(m_cifarnet(padding=padding, dropout=0.5), torch.zeros(2, 3, 32, 32))
    selectable = {n: g.num_channels for n, g in model.groups.items() if g.selectable}
    assert list(selectable) == [f"features.conv{i}" for i in range(8)]
    assert sum(selectable.values()) == 1088


def test_build_knows_it():
    model = build("m_cifarnet", 7, width=0.25, in_channels=1, padding="same").eval()
    assert isinstance(model, MCifarNet)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "m_cifarnet: expected a positive width, got 0"),
        ({"num_classes": 0}, "m_cifarnet: expected num_classes of at least 1, got 0"),
        ({"in_channels": 0}, "m_cifarnet: expected in_channels of at least 1, got 0"),
        ({"padding": "valid"}, "MCifarNet: expected padding 'symmetric' or 'same', got 'valid'"),
        ({"dropout": 1}, r"MCifarNet: expected dropout in \[0, 1\), got 1"),
        ({"dropout": float("nan")}, r"expected dropout in \[0, 1\), got nan"),
    ],
)
def test_m_cifarnet_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        m_cifarnet(**options)


def test_m_cifarnet_refuses_another_number_of_widths():
    with pytest.raises(ValueError, match="MCifarNet: expected 8 widths, got 7"):
        MCifarNet(WIDTHS[:7])

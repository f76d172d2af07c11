"""The CIFAR ResNets against He et al., and ResNet-32 as dynamic channel propagation prunes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import dcx_kernels as dcx
from dcx_kernels.models import CifarResNet, build, resnet20, resnet32, resnet56
from dcx_kernels.models.resnet import BasicBlock, PadShortcut
from tolerances import assert_exact

SHORTCUTS = ["pad", "conv"]


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def convs(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(
    ("make", "depth", "parameters", "printed"),
    [
        (resnet20, 20, 269_722, 0.27),
        (resnet32, 32, 464_154, 0.46),
        (resnet56, 56, 853_018, 0.85),
    ],
)
def test_sizes_are_the_papers(make, depth, parameters, printed):
    """He et al., Table 6: millions of parameters."""
    model = make()
    assert num_parameters(model) == parameters
    assert round(parameters / 1e6, 2) == printed
    assert len(convs(model)) + 1 == depth
    assert all(m.bias is None for m in convs(model).values())


def test_resnet32_macs():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resnet32().eval()(torch.zeros(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 2e6) == 69


def test_conv_shortcuts_add_two_projections():
    added = num_parameters(resnet32(shortcut="conv")) - num_parameters(resnet32())
    assert added == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("size", "extents"), [(32, [32, 16, 8]), (33, [33, 17, 9])])
def test_stages(size, extents, shortcut):
    model = resnet32(7, in_channels=2, shortcut=shortcut).eval()
    x = torch.zeros(2, 2, size, size)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        assert len(stage) == 5
        stage.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    assert model(x).shape == (2, 7)
    assert shapes == [(2, k, e, e) for k, e in zip([16, 32, 64], extents, strict=True)]


def test_pad_shortcut_subsamples_and_appends_zeros():
    x = torch.randn(2, 3, 5, 4)
    y = PadShortcut(3, 7)(x)
    assert_exact(y[:, :3], x[:, :, ::2, ::2])
    assert_exact(y[:, 3:], torch.zeros(2, 4, 3, 2))


@pytest.mark.parametrize("downsample", [None, PadShortcut(3, 4)])
def test_block_is_the_activated_sum(downsample):
    """Against the functional form, in training mode: each of both branches counts."""
    block = BasicBlock(3, 3 if downsample is None else 4, downsample)
    x = torch.randn(2, 3, 6, 6)
    stride, identity = (1, x) if downsample is None else (2, downsample(x))
    with torch.no_grad():
        h = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
        h = F.relu(F.batch_norm(h, None, None, block.bn1.weight, block.bn1.bias, training=True))
        h = F.conv2d(h, block.conv2.weight, padding=1)
        h = F.batch_norm(h, None, None, block.bn2.weight, block.bn2.bias, training=True)
        assert_exact(block(x), F.relu(h + identity))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_fx_traces_it(shortcut, training):
    model = resnet20(width=0.5, shortcut=shortcut).train(training)
    traced = fx.symbolic_trace(model)
    for size in (32, 17):  # no extent is baked in
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert_exact(traced(x), model(x))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_state_carries_the_network(shortcut):
    model, other = (resnet20(width=0.5, shortcut=shortcut) for _ in range(2))
    x = torch.randn(4, 3, 16, 16)
    model(x)  # moves the running statistics
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_exact(other.eval()(x), model.eval()(x))


def test_names():
    keys = {shortcut: set(resnet32(shortcut=shortcut).state_dict()) for shortcut in SHORTCUTS}
    named = {"conv1.weight", "layer1.0.bn2.running_var", "layer3.4.conv2.weight", "fc.bias"}
    assert named <= keys["pad"] < keys["conv"]
    assert all("downsample" in key for key in keys["conv"] - keys["pad"])


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_every_parameter_has_a_gradient(shortcut):
    model = resnet20(4, width=0.5, shortcut=shortcut)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


def test_initialisation():
    torch.manual_seed(0)
    model = resnet32()
    conv = model.layer3[0].conv1  # 32 -> 64: fan-in and fan-out differ
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(model.bn1.weight, torch.ones(16))
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not model.fc.bias.any()


def test_width_rounds_and_keeps_one_channel():
    widths = {m.out_channels for m in convs(resnet32(width=0.3)).values()}
    assert widths == {5, 10, 19}
    narrow = resnet32(width=0.001, in_channels=1)  # equal widths, and still strides
    assert {m.out_channels for m in convs(narrow).values()} == {1}
    assert isinstance(narrow.layer2[0].downsample, PadShortcut)
    assert narrow.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_selectable_are_the_first_convs_of_the_blocks(shortcut):
    """The channels dynamic channel propagation prunes: what feeds an add stays full-width."""
    model = dcx.convert(resnet32(shortcut=shortcut), torch.zeros(2, 3, 32, 32))
    selectable = [name for name, group in model.groups.items() if group.selectable]
    assert selectable == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(5)]


def test_build_knows_them():
    model = build("resnet32", 100, width=0.5, shortcut="conv")
    assert isinstance(model, CifarResNet)
    assert model.fc.out_features == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "resnet32: expected a positive width, got 0"),
        ({"width": float("nan")}, "resnet32: expected a positive width, got nan"),
        ({"num_classes": 0}, "resnet32: expected num_classes of at least 1, got 0"),
        ({"in_channels": 0}, "resnet32: expected in_channels of at least 1, got 0"),
        ({"shortcut": "A"}, "CifarResNet: expected shortcut 'pad' or 'conv', got 'A'"),
    ],
)
def test_resnet32_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        resnet32(**options)


@pytest.mark.parametrize(
    ("num_blocks", "widths", "message"),
    [
        (0, (16, 32, 64), "num_blocks of at least 1, got 0"),
        (1, (16, 32), "3 widths, got 2"),
        (1, (16, 32, 31), "out_channels of at least 32, got 31"),
    ],
)
def test_cifar_resnet_refuses(num_blocks, widths, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(num_blocks, widths)

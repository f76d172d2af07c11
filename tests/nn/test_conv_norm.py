"""A unit of sparse convolution and sparse norm computes what the two compute, fused or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcx_kernels import ChannelSet, SparseChannelBatchNorm2d, SparseChannelConv2d
from dcx_kernels.nn import conv_norm
from dcx_kernels.nn.conv_norm import ConvNormUnit, Unactivated, fusable
from tolerances import assert_exact, assert_gradients_close

MIDDLE, LAST = ChannelSet([0, 2, 5], 7), ChannelSet([1, 2, 3, 5], 6)


@pytest.fixture(autouse=True)
def _fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_FUSE", "1")


class Layers(nn.Module):
    """3 -> 7 -> 6 -> 6 channels: two units, the second of which is asked to store, or ``lone``."""

    def __init__(self, lone: bool = False, relu: bool = True, **norm: Any) -> None:
        super().__init__()
        self.conv1 = SparseChannelConv2d(3, 7, 3, padding=1, compact_output=True)
        self.norm1 = SparseChannelBatchNorm2d(7, relu=relu, **norm)
        self.conv2 = SparseChannelConv2d(7, 6, 3, stride=2, compact_output=True)
        self.norm2 = None if lone else SparseChannelBatchNorm2d(6, relu=relu, **norm)
        self.raw = relu
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.conv1.set_active(MIDDLE)
        self.norm1.set_active(MIDDLE)
        self.conv2.set_active(LAST, MIDDLE)
        self.units = [ConvNormUnit(self.conv1, self.norm1), ConvNormUnit(self.conv2, self.norm2)]
        if self.norm2 is not None:
            self.norm2.set_active(LAST)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        between = self.units[0](x, raw=self.raw)
        return self.units[1](between)

    def measure(self, reduction: str | None) -> list[Any]:
        """Measure the last layer of each unit; return the meters."""
        measuring = [self.norm1, self.conv2 if self.norm2 is None else self.norm2]
        for layer in measuring:
            layer.saliency_reduction = reduction
        return [layer.saliency_meter for layer in measuring]


def _seen(layers: Layers, x: Tensor, reduction: str | None = None) -> dict[str, Tensor]:
    meters = layers.measure(reduction)
    for step in range(2):
        y = layers(x + step)
        if y.requires_grad:
            (y * torch.arange(y.shape[-1], dtype=y.dtype)).sum().backward()
    seen = {"y": y.detach()}
    seen |= {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}
    seen |= {name: b.double() for name, b in layers.named_buffers()}
    kinds = {None: (), "batch": ("batch",), "sample": ("batch", "sample")}[reduction]
    for number, meter in enumerate(meters):
        seen |= {f"{kind} {number}": meter.read(kind) for kind in kinds}
    return seen


def _compare(
    monkeypatch: pytest.MonkeyPatch,
    layers: Layers,
    reduction: str | None = None,
    fuses: bool = True,
    shape: tuple[int, ...] = (3, 3, 6, 5),
) -> None:
    other, x = copy.deepcopy(layers), torch.randn(shape, dtype=torch.float64)
    calls: list[str] = []
    for name in ("channel_conv_norm", "norm_conv2d"):
        operator = getattr(conv_norm, name)

        def counted(*args: Any, operator: Any = operator, name: str = name) -> Any:
            calls.append(name)
            return operator(*args)

        monkeypatch.setattr(conv_norm, name, counted)
    fused = _seen(layers, x, reduction)
    assert bool(calls) == fuses
    calls.clear()
    monkeypatch.setenv("DCX_FUSE", "0")
    assert_gradients_close(fused, _seen(other, x, reduction))
    assert not calls


@pytest.mark.parametrize("reduction", [None, "batch", "sample"])
@pytest.mark.parametrize("lone", [False, True], ids=["two norms", "one norm"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_units_equal_their_layers(
    monkeypatch: pytest.MonkeyPatch, relu: bool, lone: bool, reduction: str | None
) -> None:
    _compare(monkeypatch, Layers(lone, relu), reduction)


@pytest.mark.parametrize(
    "norm",
    [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_settings_of_norms(
    monkeypatch: pytest.MonkeyPatch, training: bool, norm: dict[str, Any]
) -> None:
    layers = Layers(**norm)
    for buffer in layers.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    _compare(monkeypatch, layers.train(training))


def _freeze_one(layers: Layers) -> None:
    layers.norm1.eval()  # a frozen norm in a network that trains
    for parameter in (layers.conv1.weight, layers.norm2.bias):
        parameter.requires_grad_(False)


def _freeze_all(layers: Layers) -> None:
    layers.requires_grad_(False)


@pytest.mark.parametrize("freeze", [_freeze_one, _freeze_all])
def test_frozen_layers(monkeypatch: pytest.MonkeyPatch, freeze: Callable[[Layers], None]) -> None:
    layers = Layers()
    freeze(layers)
    _compare(monkeypatch, layers)


def test_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        _compare(monkeypatch, Layers())


# --- what is not fused ----------------------------------------------------------------------------


def test_a_convolution_that_measures_before_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its saliency is that of y: only its own operator knows it."""
    layers, x = Layers(), torch.randn(3, 3, 6, 5, dtype=torch.float64)
    layers.conv1.saliency_reduction = layers.conv2.saliency_reduction = "sample"
    read = []
    for forced in ("1", "0"):
        monkeypatch.setenv("DCX_FUSE", forced)
        for conv in (layers.conv1, layers.conv2):
            conv.saliency_meter.reset()
        layers(x).square().sum().backward()
        read.append([conv.saliency_meter.read("sample") for conv in (layers.conv1, layers.conv2)])
    for got, wanted in zip(*read, strict=True):
        assert_exact(got, wanted)


def _hook(layers: Layers) -> None:
    layers.conv1.register_forward_hook(lambda module, inputs, y: y * 2)
    layers.norm2.register_full_backward_hook(lambda module, dx, dy: None)


def _patch(layers: Layers) -> None:
    for conv in (layers.conv1, layers.conv2):
        forward = conv.forward
        conv.forward = lambda x, forward=forward: forward(x) + 1


def _dense_output(layers: Layers) -> None:
    for conv in (layers.conv1, layers.conv2):
        conv.compact_output = False
    full = [SparseChannelBatchNorm2d(n, relu=True).double() for n in (7, 6)]
    layers.norm1, layers.norm2 = full
    layers.units = [ConvNormUnit(layers.conv1, full[0]), ConvNormUnit(layers.conv2, full[1])]


@pytest.mark.parametrize("spoil", [_hook, _patch, _dense_output])
def test_layers_that_do_more_are_called(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Layers], None]
) -> None:
    layers = Layers()
    spoil(layers)
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    y = layers.eval()(x)
    monkeypatch.setenv("DCX_FUSE", "0")
    assert_exact(y, layers(x))


def test_a_hook_sees_what_was_not_activated_activated() -> None:
    layers, seen = Layers(), []
    layers.conv2.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    meters = layers.measure("sample")
    layers(x).square().sum().backward()
    assert isinstance(seen[0], Tensor) and seen[0].min() == 0
    plain = Layers()
    plain.load_state_dict(layers.state_dict())
    wanted = plain.measure("sample")
    plain(x).square().sum().backward()
    got = {name: parameter.grad for name, parameter in layers.named_parameters()}
    assert_gradients_close(got, {name: p.grad for name, p in plain.named_parameters()})
    for mine, meter in zip(meters, wanted, strict=True):
        assert_gradients_close({"s": mine.read("sample")}, {"s": meter.read("sample")})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 3, 3), "SparseChannelBatchNorm2d: expected more than 1 value per channel"),
        ((2, 4, 6, 5), "SparseChannelConv2d: x: expected 3 .dense. input channels"),
        ((3, 6, 5), "SparseChannelBatchNorm2d: expected a 4-D input"),
    ],
    ids=["one value", "channels", "unbatched"],
)
def test_errors_are_those_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], message: str
) -> None:
    layers = Layers()
    for forced in ("1", "0"):
        monkeypatch.setenv("DCX_FUSE", forced)
        with pytest.raises(ValueError, match=message):
            layers(torch.randn(shape, dtype=torch.float64))


def test_an_empty_batch_leaves_the_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _compare(monkeypatch, Layers(), fuses=False, shape=(0, 3, 6, 5))


def test_a_slice_without_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers(lone=True)
    none = ChannelSet.trusted(torch.empty(0, dtype=torch.int64), 7, may_be_empty=True)
    layers.conv1.take_sets(none, None)
    layers.norm1.take_sets(none, none)
    layers.conv2.take_sets(LAST, none)
    _compare(monkeypatch, layers, fuses=False)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_padding_that_is_not_fusable(options: dict[str, Any]) -> None:
    assert not fusable(SparseChannelConv2d(2, 3, 3, **options))
    assert fusable(SparseChannelConv2d(2, 3, 3, padding=(2, 1)))


def test_the_backend_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers().eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    wanted = [type(layers.units[0](x, raw=True))]
    monkeypatch.delenv("DCX_FUSE")
    monkeypatch.setenv("DCX_BACKEND", "reference")
    wanted.append(type(layers.units[0](x, raw=True)))
    monkeypatch.setattr("dcx_kernels.kernels.reference.FUSES", True, raising=False)
    wanted.append(type(layers.units[0](x, raw=True)))
    monkeypatch.setenv("DCX_FUSE", "0")
    wanted.append(type(layers.units[0](x, raw=True)))
    assert wanted == [Unactivated, Tensor, Unactivated, Tensor]


def test_tags_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_CHECK", "1")
    layers, x = Layers(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert layers(x)._dcx_active is LAST
    wrong = ChannelSet([0, 1, 5], 7)
    for layer, sets in ((layers.conv2, (LAST, wrong)), (layers.norm1, (wrong, wrong))):
        before = layer.out_active, layer.in_active
        layer.take_sets(*sets)
        with pytest.raises(ValueError, match=r"expected x over .*1, 5.*, got x over .*2, 5"):
            layers(x)
        layer.take_sets(*before)
    layers(x)


def test_a_unit_owns_nothing() -> None:
    layers = Layers()
    unit = layers.units[0]
    assert not unit.state_dict() and not list(unit.children()) and not list(unit.parameters())
    assert "SparseChannelConv2d" in repr(unit)
    both = copy.deepcopy(nn.ModuleDict({"unit": unit, "layers": layers}))
    assert both["unit"]._layers[0] is both["layers"].conv1
    assert both["unit"]._layers[1] is both["layers"].norm1

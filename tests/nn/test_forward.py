"""What the layers of a network read in a forward pass is made before it, and gone after it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcx_kernels as dcx
from dcx_kernels import ChannelSet
from dcx_kernels.nn._forward import Forward, Operands
from tolerances import assert_exact, assert_gradients_close


def _network() -> nn.Sequential:
    conv, norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(6, 4, 1)).double()


def _trained() -> tuple[dcx.ChannelModel, dcx.optim.SGD, torch.Tensor]:
    x = torch.randn(2, 3, 5, 5).double()
    model = dcx.convert(_network(), x)
    model.set_active({"0": ChannelSet([0, 2, 5], 6)})
    return model, dcx.optim.SGD(model, lr=0.1), x


def test_layers_called_on_their_own_do_not_read_what_an_earlier_pass_left() -> None:
    model, optimizer, x = _trained()
    model(x).square().sum().backward()
    optimizer.step()
    model.set_active({"0": ChannelSet([1, 2, 4], 6)})
    conv = model.get_submodule("0")
    assert_exact(conv(x).detach(), F.conv2d(x, conv.weight[[1, 2, 4]]).detach())


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model, optimizer, x = _trained()
    model(x).square().sum().backward()
    before = {name: gradient.tensor.clone() for name, gradient in model.compact_grads.items()}
    with pytest.raises(ValueError, match=r"expected .* input channels"):
        model(x[:, :2])
    after = {name: gradient.tensor for name, gradient in model.compact_grads.items()}
    assert_gradients_close(after, before)
    assert not model._forward_pass.operands
    optimizer.step()


def test_gradients_of_leaves_are_out_of_sight_during_a_pass() -> None:
    leaf = torch.ones(3, requires_grad=True)
    leaf.grad = gradient = torch.ones(3)
    forward = Forward()
    forward.begin({"a": Operands(True, leaf, None), "b": Operands(True, leaf, None)})
    assert leaf.grad is None and forward.number == 1 and set(forward.operands) == {"a", "b"}
    forward.end()
    assert leaf.grad is gradient and not forward.operands
    leaf.grad = None
    forward.begin({"a": Operands(True, leaf, None)})
    forward.end()
    assert leaf.grad is None and forward.number == 2


def test_a_copy_counts_its_own_passes() -> None:
    model, _, x = _trained()
    model(x)
    other = copy.deepcopy(model)
    other(x).sum().backward()
    assert (model._forward_pass.number, other._forward_pass.number) == (1, 1)
    norm = other.get_submodule("1")
    assert norm.saliency_meter.forward is other._forward_pass
    assert other.saliency()["0"].shape == (3,)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_a_norm_called_twice_in_a_pass_measures_both_calls(reduction: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = (
                nn.Conv2d(3, 6, 3),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 4, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.norm(self.conv(x)))
            return self.last(self.norm(x).relu())

    x, network = torch.randn(2, 3, 5, 5).double(), Twice().double()
    found = {}
    for execution in ("sparse", "mask"):
        model = dcx.convert(network, x, execution=execution, saliency=reduction)
        model.set_active({"conv": ChannelSet([0, 2, 5], 6)})
        model(x).square().sum().backward()
        found[execution] = model.saliency(reduction)
    assert_gradients_close(found["sparse"], found["mask"])


def test_samples_are_those_that_a_layer_sees() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x.flatten(0, 1)).mean((2, 3))

    x, network = torch.randn(2, 4, 3, 5, 5).double(), Frames().double()
    found = {}
    for execution in ("sparse", "mask"):
        model = dcx.convert(network, x, execution=execution, saliency="sample")
        model.set_active({"layers.0": ChannelSet([0, 2, 5], 6)})
        model(x).square().sum().backward()
        found[execution] = model.saliency("sample")
    assert_gradients_close(found["sparse"], found["mask"])

"""Networks with gates: exact at density 1, skipping equals masking, winners are handed on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcx_kernels as dcx
from dcx_kernels.models import m_cifarnet, resnet20, vgg16
from dcx_kernels.nn.gated_conv_channels import SampleChannels
from tolerances import assert_exact, assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")


def resnet(**options: Any) -> nn.Module:
    """A torchvision ResNet of one basic block a stage, as ResNet-18 is of two."""
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5, **options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "m_cifarnet": lambda: m_cifarnet(width=1 / 8, dropout=0.0),
    "m_cifarnet-same": lambda: m_cifarnet(width=1 / 8, padding="same"),
    "vgg16": lambda: vgg16(width=1 / 16),
    "resnet20-pad": lambda: resnet20(width=0.5),
    "resnet20-conv": lambda: resnet20(width=0.5, shortcut="conv"),
    "resnet-torchvision": resnet,
}


class Odd(nn.Module):
    """What is gated, what is not, and everything between that hands winners on or cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(6, eps=1e-3)
        self.bare = nn.Conv2d(6, 6, 1)
        self.grouped, self.grouped_norm = nn.Conv2d(6, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6)
        self.linear, self.linear_norm = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.down, self.down_norm = nn.Conv2d(6, 9, 3, 2, 1), nn.BatchNorm2d(9, affine=False)
        self.wide, self.wide_norm = nn.Conv2d(15, 7, (1, 3), dilation=2), nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = x + torch.sigmoid(self.bare(F.max_pool2d(x, 3, 1, 1)))  # a plain tensor joins
        y = F.leaky_relu(self.linear_norm(self.linear(self.grouped_norm(self.grouped(x)))))
        y = torch.sigmoid(y)  # not zero at zero: all channels must be there
        z = self.down_norm(self.down(y)) * 2
        z = torch.cat([F.avg_pool2d(x, 2), z], 1)
        return self.head(self.wide_norm(self.wide(z)).relu_().mean((2, 3)))


NETWORKS["odd"] = Odd
# the others have nothing that is not in these
QUICK = ["m_cifarnet-same", "resnet20-pad", "resnet20-conv", "odd"]
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


def trained(name: str) -> nn.Module:
    """Build a float64 network whose norms have seen data, with odd gammas."""
    torch.manual_seed(3)
    model = NETWORKS[name]().double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        if norm.affine:
            nn.init.normal_(norm.weight, std=0.5)
            nn.init.normal_(norm.bias, std=0.5)
        norm.momentum = 0.5
    warm_up(model)
    return model


def warm_up(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        for _ in range(6):
            model(images(8))
    model.eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("beta_at", ["inside", "outside"])
@pytest.mark.parametrize("name", EACH)
def test_fold_is_the_dense_network_at_density_1(name: str, beta_at: Any) -> None:
    dense, x = trained(name), images(4)
    if name == "odd":
        with torch.no_grad():
            dense.stem_norm.weight[1] = 0  # type: ignore[union-attr, operator]
    model = dcx.convert_fbs(dense, init="fold", beta_at=beta_at)
    with torch.no_grad():
        wanted = {"eval": dense(x), "train": dense.train()(x), "eval again": dense.eval()(x)}
        ours = {"eval": model(x), "train": model.train()(x), "eval again": model.eval()(x)}
    assert_gradients_close(ours, wanted)


@pytest.mark.parametrize("init", ["paper", "fold"])
@pytest.mark.parametrize("density", [0.5, 0.3])
@pytest.mark.parametrize("name", EACH)
def test_skipping_equals_masking_in_evaluation(name: str, density: float, init: Any) -> None:
    model = dcx.convert_fbs(trained(name), density=density, init=init)
    warm_up(model)
    for n in (1, 3):
        x = images(n)
        with torch.no_grad():
            model.set_execution("sparse")
            ours = model(x)
            model.set_execution("mask")
            assert_gradients_close({"logits": ours}, {"logits": model(x)})


@pytest.mark.slow
@pytest.mark.parametrize("n", [16, 33, 64, 128])
def test_skipping_equals_masking_in_large_batches(n: int) -> None:
    for name in ("m_cifarnet", "resnet20-conv", "vgg16"):
        model, x = dcx.convert_fbs(trained(name), density=0.5), images(n)
        warm_up(model)
        with torch.no_grad():
            ours = model(x)
            model.set_execution("mask")
            assert_gradients_close({name: ours}, {name: model(x)})


@pytest.mark.parametrize("stats", ["batch", "active"])
@pytest.mark.parametrize("name", ["m_cifarnet", "resnet20-conv", "resnet20-pad", "odd"])
def test_training_equals_the_masked_network(name: str, stats: Any) -> None:
    """Two steps of SGD with the Lasso: loss, gradients, weights, running statistics."""
    dense = trained(name)
    one = dcx.convert_fbs(dense, density=0.4, stats=stats)
    warm_up(one)
    two = copy.deepcopy(one)
    two.set_execution("mask")
    for _ in range(2):
        x, labels = images(6), torch.randint(0, 4, (6,))
        for model in (one, two):
            model.train().zero_grad()
            loss = F.cross_entropy(model(x), labels) + dcx.gate_penalty(model, 1e-3)
            loss.backward()
        ours = {n: p.grad for n, p in one.named_parameters()}
        assert_gradients_close(ours, {n: p.grad for n, p in two.named_parameters()}, tol=1e-8)
        for model in (one, two):
            torch.optim.SGD(model.parameters(), lr=0.01).step()
    state, wanted = one.state_dict(), two.state_dict()
    floats = [n for n in wanted if wanted[n].is_floating_point()]
    assert_gradients_close({n: state[n] for n in floats}, {n: wanted[n] for n in floats}, tol=1e-8)


def test_winners_are_handed_on_and_inputs_are_skipped() -> None:
    model, x = dcx.convert_fbs(trained("m_cifarnet"), density=0.5), images(1)
    seen: dict[str, tuple[int, int]] = {}
    for name, layer in model.gated.items():

        def note(layer: Any, args: Any, out: Any, name: str = name) -> None:
            given = SampleChannels.of(args[0])
            seen[name] = given.values.shape[1], out.values.shape[1]

        layer.register_forward_hook(note)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    widths = [3, 8, 8, 16, 16, 16, 24, 24, 24]
    given = [3, *(w // 2 for w in widths[1:-1])]
    assert list(seen.values()) == list(zip(given, (w // 2 for w in widths[1:]), strict=True))
    pixels = [900, 900, 225, 225, 225, 64, 64, 64]
    convs = sum(9 * c * (w // 2) * p for c, w, p in zip(given, widths[1:], pixels, strict=True))
    gates = sum(a * b for a, b in itertools.pairwise(widths))
    assert counter.get_total_flops() == 2 * (convs + gates + 24 * 10)


def test_a_sum_is_absent_only_where_both_terms_are() -> None:
    model = dcx.convert_fbs(trained("resnet20-conv"), density=0.25)
    warm_up(model)
    seen: dict[str, SampleChannels] = {}
    for name, layer in model.gated.items():
        layer.register_forward_hook(
            lambda layer, args, out, name=name: seen.update(
                {name: out, f"{name} in": SampleChannels.of(args[0])}
            )
        )
    with torch.no_grad():
        model(images(3))
    first, second = seen["layer1.0.conv2"], seen["conv1"]
    total = seen["layer1.1.conv1 in"]
    assert total.idx is not None and first.idx is not None and second.idx is not None
    assert torch.equal(total.dense(), (first.dense() + second.dense()).relu())
    for n in range(3):
        both = set(first.idx[n].tolist()) | set(second.idx[n].tolist())
        assert both <= set(total.idx[n].tolist())
        rest = total.dense()[n, sorted(set(range(8)) - both)]
        assert_exact(rest, torch.zeros_like(rest))


def test_channels_padded_before_and_behind_stay_absent() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.a_norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.b, self.b_norm = nn.Conv2d(9, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(self.a_norm(self.a(x)).relu()[:, :, 1:, ::2], (1, 0, 0, 2, 1, 2))
            return self.b_norm(self.b(x)).relu().mean((2, 3))

    dense, x = Padded().double().eval(), images(3)
    with torch.no_grad():
        same = dcx.convert_fbs(dense, init="fold")(x)
        assert_gradients_close({"y": same}, {"y": dense(x)})
    model = dcx.convert_fbs(dense, density=0.5)
    warm_up(model)
    read: list[int] = []
    model.gated["b"].register_forward_hook(
        lambda layer, args, out: read.append(SampleChannels.of(args[0]).values.shape[1])
    )
    with torch.no_grad():
        ours = model(x)
        model.set_execution("mask")
        assert_gradients_close({"y": ours}, {"y": model(x)})
    assert read == [3, 6]  # half of those that are not padding; all of them where it masks


def test_says_what_is_kept_and_why() -> None:
    model = dcx.convert_fbs(Odd())
    assert list(model.gated) == ["stem", "linear", "down", "wide"]
    assert model.kept == {
        "bare": "no batch norm alone reads it",
        "grouped": "a grouped convolution",
    }
    assert [layer.relu for layer in model.gated.values()] == [True, False, False, True]


def test_every_convolution_of_the_papers_networks_is_gated() -> None:
    for network, count in (
        (torchvision.models.resnet18(), 20),
        (vgg16(), 13),
        (m_cifarnet(), 8),
    ):
        model = dcx.convert_fbs(network)
        assert len(model.gated) == count and not model.kept


def test_state_moves_with_the_state_dict() -> None:
    model = dcx.convert_fbs(trained("resnet20-pad"), density=0.4)
    other = dcx.convert_fbs(NETWORKS["resnet20-pad"]().double(), density=1.0)
    other.load_state_dict(model.state_dict())
    x = images(2)
    with torch.no_grad():
        assert_exact(other.eval()(x), model(x))
        assert_exact(copy.deepcopy(model)(x), model(x))
    model.set_density(0.9)
    assert {layer.density for layer in model.gated.values()} == {0.9}


def test_the_dense_model_is_left_alone() -> None:
    dense, x = trained("resnet20-pad"), images(2)
    with torch.no_grad():
        before = dense(x)
        model = dcx.convert_fbs(dense, density=0.5).train()
        model(x)
        assert_exact(dense(x), before)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dcx.convert_fbs(Odd(), init="none"), ValueError, "init 'paper' or 'fold'"),  # type: ignore[arg-type]
        (lambda: dcx.convert_fbs(Odd(), density=0), ValueError, r"density in \(0, 1\], got 0"),
        (lambda: dcx.convert_fbs(dcx.convert_fbs(Odd())), TypeError, "got FBSModel"),
        (lambda: dcx.convert_fbs(nn.Linear(2, 2)), ValueError, "a model with convolutions"),
        (
            lambda: dcx.convert_fbs(nn.Sequential(nn.Conv2d(3, 4, 3))),
            ValueError,
            "gated, got 0: no batch norm alone reads it",
        ),
        (lambda: dcx.convert_fbs(Odd()).set_stats("all"), ValueError, "got 'all'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()

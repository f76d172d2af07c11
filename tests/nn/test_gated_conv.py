"""The gated convolution against equations 5 to 8 in plain torch: outputs, gradients, statistics."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dcx_kernels as dcx
from dcx_kernels.nn.gated_conv import GatedConv2d, gate_penalty
from dcx_kernels.nn.gated_conv_channels import SampleChannels, union_add
from dcx_kernels.nn.gated_conv_parts import winners_of
from gated_oracle import gated_oracle, odd_case
from tolerances import assert_exact, assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = list(itertools.product(["batch", "active"], ["inside", "outside"], [True, False]))
WINDOW = ((2, 1), (1, 0), (1, 2))


def make(density: float, **options: Any) -> GatedConv2d:
    return GatedConv2d(5, 7, 3, *WINDOW, density=density, dtype=torch.float64, **options)


def sparse_input(n: int, channels: int, c: int) -> SampleChannels:
    """Draw an input in which every sample has c channels of its own."""
    idx = torch.stack([torch.randperm(channels)[:c].sort().values for _ in range(n)])
    values = torch.randn(n, c, 7, 6, dtype=torch.float64)
    return SampleChannels(values, idx, channels)


# --- the gate -------------------------------------------------------------------------------------


def test_hand_computed_gate_sequence() -> None:
    layer = GatedConv2d(2, 4, 1, density=0.5, dtype=torch.float64)
    phi = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        layer.phi.copy_(phi)
        layer.rho.copy_(torch.tensor([1.0, 1.0, 0.0, 3.0]))
        layer.beta.copy_(torch.tensor([0.0, 0.5, 1.0, -2.0]))
        layer.weight.fill_(1.0)
    layer.eval()
    layer.norm.running_var.fill_(1 - 1e-5)
    # s = (mean |x|) of channels: (1, 2), (4, 0), (0, 1)
    x = torch.tensor(
        [[[[-1.0, 1]], [[2, 2]]], [[[4.0, 4]], [[0, 0]]], [[[0.0, 0]], [[1, -1]]]],
        dtype=torch.float64,
    )
    y = layer(x)
    # g = relu(s phi + rho): sample 0: 2 3 3 2; sample 1: 5 1 4 0 (3 - 4 < 0); sample 2: 1 2 1 3
    g = torch.tensor([[2, 3, 3, 2], [5, 1, 4, 0], [1, 2, 1, 3]], dtype=torch.float64)
    assert_exact(layer.gate.detach(), g)
    # two winners: channels 1 2; 0 2; 1 3. conv = x0 + x1: (1, 3), (4, 4), (1, -1)
    wanted = torch.tensor(
        [
            [[0, 0], [3 * 1.5, 3 * 3.5], [3 * 2.0, 3 * 4.0], [0, 0]],
            [[5 * 4.0, 5 * 4.0], [0, 0], [4 * 5.0, 4 * 5.0], [0, 0]],
            [[0, 0], [2 * 1.5, 0], [0, 0], [0, 0]],  # 2 (-1 + 0.5) and 3 (1 - 2) are below zero
        ],
        dtype=torch.float64,
    )[:, :, None]
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-12, atol=1e-12)
    layer.set_density(0.25)  # the one winner: 1 (a tie with 2), 0, 3
    alive = layer(x).detach().flatten(2).abs().sum(2) > 0
    assert alive.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("density", "channels", "k"),
    # 0.07 * 100 is 7.000000000000001
    [(0.3, 10, 3), (0.07, 100, 7), (0.1, 10, 1), (0.31, 10, 4), (1.0, 3, 3), (0.01, 5, 1)],
)
def test_winners_are_exactly_the_ceiling(density: float, channels: int, k: int) -> None:
    assert winners_of(density, channels) == k
    layer = GatedConv2d(3, channels, 3, density=density)
    layer.rho.data.fill_(1e3)  # positive gates, all different
    layer.compact_output = True
    out = layer(torch.rand(4, 3, 5, 5))
    assert out.values.shape[1] == k == layer.num_winners


def test_densities_of_the_schedule_are_exact() -> None:
    for channels in (10, 64, 128, 192, 512):
        for i in range(10):
            exact = -(-(10 - i) * channels // 10)  # ceil of a fraction of whole numbers
            assert winners_of(1 - i / 10, channels) == exact


# --- the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("c", [5, 2], ids=["dense-in", "compact-in"])
@pytest.mark.parametrize(("stats", "beta_at", "relu"), OPTIONS)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_training_equals_the_oracle(
    stats: Any, beta_at: Any, relu: bool, density: float, c: int, execution: Any
) -> None:
    layer = make(density, stats=stats, beta_at=beta_at, relu=relu, execution=execution)
    p = odd_case(layer)
    x = sparse_input(6, 5, c)
    values = x.values.clone().requires_grad_()
    dense = x._replace(values=values).dense()
    wanted, mask = gated_oracle(
        dense, p, layer.num_winners, training=True, stats=stats, beta_at=beta_at, relu=relu,
        window=WINDOW,
    )  # fmt: skip
    dy = torch.randn_like(wanted)
    names = [n for n, _ in layer.named_parameters()]
    theirs = torch.autograd.grad((wanted * dy).sum(), [values, *layer.parameters()])
    again = x.values.clone().requires_grad_()
    y = layer(x._replace(values=again))
    ours = torch.autograd.grad((y * dy).sum(), [again, *layer.parameters()])
    assert_gradients_close(
        {"y": y, **dict(zip(["x", *names], ours, strict=True))},
        {"y": wanted, **dict(zip(["x", *names], theirs, strict=True))},
    )
    assert int(mask.sum()) == 6 * layer.num_winners


@pytest.mark.parametrize("n", [0, 1, 2, 33])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("subsample", ["l1", "l2", "linf", "variance"])
@pytest.mark.parametrize("beta_at", ["inside", "outside"])
def test_evaluation_equals_the_oracle(n: int, grad: bool, subsample: Any, beta_at: Any) -> None:
    layer = make(0.5, subsample=subsample, beta_at=beta_at).eval()
    p = odd_case(layer)
    x = sparse_input(n, 5, 3) if n else SampleChannels(torch.zeros(0, 5, 7, 6).double(), None, 5)
    wanted, _ = gated_oracle(
        x.dense(), p, 4, training=False, subsample=subsample, beta_at=beta_at, window=WINDOW
    ) if n else (torch.zeros(0, 7, 4, 2).double(), None)  # fmt: skip
    with torch.set_grad_enabled(grad):
        y = layer(x)
        layer.execution = "mask"
        masked = layer(x)
    assert y.requires_grad == grad
    assert_gradients_close({"sparse": y, "mask": masked}, {"sparse": wanted, "mask": wanted})


@pytest.mark.parametrize("stats", ["batch", "active"])
def test_losers_get_no_task_gradient(stats: Any) -> None:
    layer = make(0.4, stats=stats)
    with torch.no_grad():
        layer.rho.copy_(torch.tensor([9.0, 0, 8, 0, 7, 0, 0]))  # 0, 2 and 4 win everywhere
        layer.phi.mul_(1e-3)
    layer(torch.randn(6, 5, 7, 6).double()).square().sum().backward()
    for name in ("phi", "rho", "beta", "weight"):
        rows = getattr(layer, name).grad.flatten(1 if name in ("phi", "weight") else 0)
        rows = rows.abs().reshape(7, -1).sum(1)
        assert (rows[[1, 3, 5, 6]] == 0).all(), name
        assert (rows[[0, 2, 4]] > 0).all(), name


def test_running_statistics_of_the_batch_are_those_of_batch_norm() -> None:
    layer, x = make(0.4), torch.randn(6, 5, 7, 6).double()
    norm = copy.deepcopy(layer.norm)
    layer(x)
    norm(F.conv2d(x, layer.weight, None, *WINDOW))
    assert_exact(layer.norm.running_mean, norm.running_mean)
    assert_exact(layer.norm.running_var, norm.running_var)


def test_running_statistics_of_active_samples() -> None:
    layer = make(3 / 7, stats="active")
    with torch.no_grad():
        layer.phi.zero_()
        layer.phi[:2, 0] = torch.tensor([1.0, -1.0])
        layer.rho.copy_(torch.tensor([1.0, 5, 4, 0, 0, -1, -1]))
    x = torch.randn(4, 5, 7, 6).double()
    x[:, 0] = torch.tensor([9.0, 0, 9, 0])[:, None, None]
    # winners: samples 0 and 2: 0, 2 and (g = 0, which does not count) 1; samples 1 and 3: 1 2 0
    before = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    layer(x)
    z = F.conv2d(x, layer.weight, None, *WINDOW)
    for channel, who in ((0, [0, 1, 2, 3]), (1, [1, 3]), (2, [0, 1, 2, 3])):
        some = z[who, channel].detach()
        for running, old, new in zip(
            (layer.norm.running_mean, layer.norm.running_var),
            before,
            (some.mean(), some.var()),
            strict=True,
        ):
            torch.testing.assert_close(running[channel], 0.9 * old[channel] + 0.1 * new)
    assert_exact(layer.norm.running_mean[3:], before[0][3:])  # nobody was there: they rest
    assert_exact(layer.norm.running_var[3:], before[1][3:])


# --- the penalty, sums, state ---------------------------------------------------------------------


def test_penalty_reaches_losers() -> None:
    layer, other = make(0.4), make(1.0)
    model = torch.nn.ModuleList([layer, other])
    x = torch.randn(6, 5, 7, 6).double()
    layer(x), other(x)
    s = x.abs().mean((2, 3))
    wanted = sum(torch.relu(s @ m.phi.t() + m.rho).sum(1).mean() for m in model)
    torch.testing.assert_close(gate_penalty(model, 0.5), 0.5 * wanted)
    gate_penalty(model).backward()
    assert (layer.rho.grad != 0).sum() > 3  # more than the winners of one sample
    torch.testing.assert_close(gate_penalty(model), 1e-8 * wanted)


def test_penalty_needs_a_forward() -> None:
    with pytest.raises(ValueError, match="0: expected a forward before gate_penalty, got none"):
        gate_penalty(torch.nn.Sequential(make(0.4)))
    with pytest.raises(ValueError, match="expected a model with gated layers, got Linear"):
        gate_penalty(torch.nn.Linear(2, 2))


def test_union_add_by_hand() -> None:
    def term(idx: list[list[int]], values: list[list[float]]) -> SampleChannels:
        tensor = torch.tensor(values)[:, :, None, None]
        return SampleChannels(tensor, torch.tensor(idx), 5)

    a = term([[0, 3], [1, 2]], [[1.0, 2], [3, 4]])
    b = term([[3, 4], [1, 2]], [[10.0, 20], [30, 40]])
    out = union_add(a, b)
    # sample 0: 0, 3, 4; sample 1 has 1 and 2 and fills up with its lowest absent channel
    assert_exact(out.idx, torch.tensor([[0, 3, 4], [0, 1, 2]]))
    assert_exact(out.values.flatten(1), torch.tensor([[1.0, 12, 20], [0, 33, 44]]))
    assert_exact(out.dense(), a.dense() + b.dense())
    with pytest.raises(ValueError, match="terms of 5 channels, got 4"):
        union_add(a, torch.zeros(2, 4, 1, 1))


def test_union_add_of_gradients() -> None:
    a, b = sparse_input(3, 5, 2), sparse_input(3, 5, 3)
    values = [t.values.clone().requires_grad_() for t in (a, b)]
    out = union_add(*(t._replace(values=v) for t, v in zip((a, b), values, strict=True)))
    dy = torch.randn(3, 5, 7, 6, dtype=torch.float64)
    (out.dense() * dy).sum().backward()
    for t, v in zip((a, b), values, strict=True):
        expanded = t.idx[:, :, None, None].expand_as(v)
        assert_exact(v.grad, dy.gather(1, expanded))


def test_state_dict_is_complete() -> None:
    torch.manual_seed(1)
    one, two = make(0.4), make(1.0)
    odd_case(one)
    one.full_channels = 12  # as if five had been cut
    two.load_state_dict(one.state_dict())
    assert two.density == 0.4 and two.num_winners == one.num_winners == 5
    x = torch.randn(2, 5, 7, 6).double()
    assert_exact(one.eval()(x), two.eval()(x))
    one(x)
    assert copy.deepcopy(one).gate is None and one.gate is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density in \(0, 1\], got 0.0"),
        ({"density": 1.1}, r"density in \(0, 1\], got 1.1"),
        ({"stats": "sample"}, r"stats to be one of \('batch', 'active'\), got 'sample'"),
        ({"subsample": "l3"}, "subsample to be one of"),
        ({"beta_at": "off"}, "beta_at to be one of"),
        ({"execution": "fast"}, "execution to be one of"),
    ],
)
def test_refuses_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedConv2d(3, 4, 3, **options)


def test_refuses_an_input_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 5, H, W\), got \(1, 4, 5, 5\)"):
        make(0.5)(torch.zeros(1, 4, 5, 5))


def test_is_public() -> None:
    assert dcx.GatedConv2d is GatedConv2d and dcx.gate_penalty is gate_penalty


def test_losers_are_never_computed() -> None:
    """NaN in a loser's filter reaches nothing: it was not read (a mask would return NaN)."""
    layer = make(0.4).eval()
    with torch.no_grad():
        layer.rho.copy_(torch.tensor([9.0, 0, 8, 0, 7, 0, 0]))
        layer.phi.zero_()
        layer.weight[[1, 3, 5, 6]] = torch.nan
        y = layer(sparse_input(1, 5, 2))
    assert y.isfinite().all() and y.abs().sum() > 0
    with torch.no_grad():
        layer.execution = "mask"
        assert not layer(sparse_input(1, 5, 2)).isfinite().all()

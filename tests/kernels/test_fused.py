"""The fused kernels' reference is what autograd makes of the written-out definition, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_helpers import leaf, spread
from dcx_kernels.kernels import reference
from dcx_kernels.kernels.norm import Norm, NormGrad
from tolerances import assert_close_to_float64, assert_exact, assert_gradients_close

EPS = 1e-3


class Case(NamedTuple):
    """A convolution of c channels into k; ``full``: K x C of which the lists are active."""

    c: int = 3
    k: int = 5
    n: int = 2
    size: tuple[int, int] = (6, 5)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True
    layout: str = "NCHW"
    lists: bool = False


CASES = {
    "plain": Case(),
    "one-channel": Case(c=1, k=1, n=1),
    "wide-stride": Case(c=17, k=3, stride=(2, 1), padding=(2, 0), bias=False),
    "dilation": Case(dilation=(2, 1), padding=(0, 2)),
    "groups": Case(c=4, k=6, groups=2),
    "depthwise": Case(c=3, k=3, groups=3),
    "channels_last": Case(layout="channels_last"),
    "strided": Case(layout="strided"),
    "lists": Case(lists=True),
    "no-sample": Case(n=0),
}
PLACES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Problem:
    """Tensors of a case, with the definition of the fused forward."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case = case
        x = torch.randn(case.n, case.c, *case.size, dtype=torch.float64)
        if case.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        self.x = leaf((spread(x) if case.layout == "strided" else x).to(dtype))
        full = (case.k + 2, case.c + 3) if case.lists else (case.k, case.c // case.groups)
        self.weight = torch.randn(*full, 3, 3, dtype=torch.float64).to(dtype).requires_grad_()
        self.bias = torch.randn(full[0], dtype=torch.float64).to(dtype) if case.bias else None
        wide = torch.promote_types(dtype, torch.float32)
        self.norm = Norm(*(torch.randn(case.c, dtype=wide) for _ in range(3)))
        for vector in (self.norm.scale, self.norm.shift):
            vector.requires_grad_()
        self.out_idx = torch.arange(case.k) + 1 if case.lists else None
        self.in_idx = torch.arange(case.c) + 2 if case.lists else None
        self.lists = self.in_idx, self.out_idx
        window = case.stride, case.padding, case.dilation
        self.window: Any = tuple(list(pair) for pair in window)
        self.geometry: Any = *self.window, case.groups, case.groups

    def active(self, x_norm: bool) -> Tensor:
        """Return y by the definition."""
        z = self.x
        if x_norm:
            z = ((z - _over(self.norm.center)) * _over(self.norm.scale)).add(_over(self.norm.shift))
            z = z.relu()
        weight, bias = self.weight, self.bias
        if self.case.lists:
            weight = weight[self.out_idx][:, self.in_idx]
            bias = None if bias is None else bias[self.out_idx]
        return F.conv2d(z, weight, bias, *self.window, self.case.groups)

    def fwd(self, x_norm: bool, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
        return reference.fused_conv2d_fwd(
            self.x.detach(), self._norm(x_norm), self.weight.detach(), self.bias, *self.lists,
            *self.geometry, statistics,
        )  # fmt: skip

    def dgrad(
        self, dy: Tensor, grad: NormGrad | None, x_norm: bool, per_sample: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.fused_conv2d_dgrad(
            dy, grad, self.x.detach(), self._norm(x_norm), self.weight.detach(), *self.lists,
            *self.geometry, per_sample,
        )  # fmt: skip

    def wgrad(self, dy: Tensor, grad: NormGrad | None, x_norm: bool) -> Tensor:
        dw = reference.fused_conv2d_wgrad(
            dy, grad, self.x.detach(), self._norm(x_norm), [3, 3], *self.window, self.case.groups
        )
        if not self.case.lists:
            return dw
        return reference.unpack(dw, list(self.weight.shape), self.out_idx, self.in_idx)

    def _norm(self, wanted: bool) -> Norm | None:
        return Norm(*(v.detach() for v in self.norm)) if wanted else None


def _over(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


@pytest.mark.parametrize("x_norm", [False, True], ids=["x", "norm"])
@PLACES
def test_forward_equals_its_definition(case: Case, x_norm: bool) -> None:
    problem = Problem(case)
    wanted = problem.active(x_norm).detach()
    y, mean, m2 = problem.fwd(x_norm, True)
    assert_gradients_close({"y": y}, {"y": wanted})
    count = max(1, wanted[:, 0].numel())
    over = (0, 2, 3)
    sums = {"mean": wanted.sum(over) / count}
    sums["m2"] = (wanted - _over(sums["mean"])).square().sum(over)
    assert_gradients_close({"mean": mean, "m2": m2}, sums)
    again, *nothing = problem.fwd(x_norm, False)
    assert_exact(again, y)
    assert all(tuple(t.shape) == (0,) for t in nothing)


@PLACES
def test_gradients_equal_autograd(case: Case) -> None:
    problem = Problem(case)
    y = problem.active(True)
    dy = torch.randn_like(y)
    leaves = {"x": problem.x, "weight": problem.weight}
    leaves |= {"scale": problem.norm.scale, "shift": problem.norm.shift}
    wanted = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    dx, dscale, dshift = problem.dgrad(dy, None, True)
    dw = problem.wgrad(dy, None, True)
    got = {"x": dx, "weight": dw, "scale": dscale, "shift": dshift}
    assert_gradients_close(got, wanted)
    samples = problem.dgrad(dy, None, True, per_sample=True)
    assert_exact(samples[0], dx)
    assert all(t.shape == (case.n, case.c) for t in samples[1:])
    summed = {"scale": samples[1].sum(0), "shift": samples[2].sum(0)}
    assert_gradients_close(summed, {name: wanted[name] for name in summed})


@pytest.mark.parametrize("case", [CASES["wide-stride"], CASES["channels_last"]], ids=["s", "last"])
def test_without_a_norm_it_is_the_plain_convolution(case: Case) -> None:
    problem = Problem(case)
    y = problem.active(False)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [problem.x, problem.weight], dy)
    dx, *nothing = problem.dgrad(dy, None, False)
    got = {"x": dx, "weight": problem.wgrad(dy, None, False)}
    assert_gradients_close(got, {"x": wanted[0], "weight": wanted[1]})
    assert all(tuple(t.shape) == (0,) for t in nothing)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("behind", [True, False], ids=["dz", "dy"])
@pytest.mark.parametrize("name", ["plain", "wide-stride", "groups", "channels_last", "lists"])
def test_gradients_pass_the_norm_behind(
    name: str, behind: bool, relu: bool, training: bool
) -> None:
    """As handed on: dz with norm and ReLU to apply, or dy that has passed them."""
    problem = Problem(CASES[name])
    k = problem.case.k
    gamma, beta = (torch.randn(k, dtype=torch.float64).requires_grad_() for _ in range(2))
    mean, var = torch.randn(k, dtype=torch.float64), torch.rand(k, dtype=torch.float64) + 0.5
    y = problem.active(True)
    h = F.batch_norm(y, mean.clone(), var.clone(), gamma, beta, training, 0.3, EPS)
    dz = torch.randn_like(h)
    z = h.relu() if relu else h
    leaves = {"x": problem.x, "weight": problem.weight, "gamma": gamma, "beta": beta}
    leaves |= {"scale": problem.norm.scale, "shift": problem.norm.shift}
    wanted = dict(zip(leaves, torch.autograd.grad(z, list(leaves.values()), dz), strict=True))

    raw, batch_mean, m2 = problem.fwd(True, training)
    count = raw[:, 0].numel()
    vectors = reference.norm_fold(
        batch_mean, m2, gamma.detach(), beta.detach(), mean, var, None, count, training, 0.3, EPS
    )
    norm, invstd = Norm(*vectors[:3]), vectors[3]
    dscale, dshift = reference.norm_act_bwd(dz, raw, norm, relu, False)
    dgamma, dbeta, slope, offset, _ = reference.norm_fold_bwd(
        dscale, dshift, norm.scale, norm.shift, invstd, count, training
    )
    if behind:
        grad = NormGrad(raw, norm.center, slope, offset, norm, relu)
    else:
        grad = NormGrad(raw, norm.center, slope, offset)
        dz = torch.where(h > 0, dz, 0.0) if relu else dz
        dz = (dz * _over(norm.scale)).detach()
    dx, dx_scale, dx_shift = problem.dgrad(dz, grad, True)
    got = {"x": dx, "weight": problem.wgrad(dz, grad, True), "gamma": dgamma, "beta": dbeta}
    assert_gradients_close({**got, "scale": dx_scale, "shift": dx_shift}, wanted)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_norm_and_activation_equal_autograd(layout: str, relu: bool) -> None:
    y = torch.randn(3, 5, 4, 3, dtype=torch.float64)
    y = y.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else y
    norm = Norm(*(torch.randn(5, dtype=torch.float64) for _ in range(3)))
    scale, shift = leaf(norm.scale), leaf(norm.shift)
    h = (y - _over(norm.center)) * _over(scale) + _over(shift)
    wanted = h.relu() if relu else h
    z = reference.norm_act_fwd(y, norm, relu)
    assert_gradients_close({"z": z}, {"z": wanted})
    assert z.stride() == y.stride()
    dz = torch.randn_like(z)
    names = "dscale", "dshift"
    gradients = torch.autograd.grad(wanted, [scale, shift], dz)
    got = reference.norm_act_bwd(dz, y, norm, relu, False)
    samples = reference.norm_act_bwd(dz, y, norm, relu, True)
    for found in (got, [t.sum(0) for t in samples]):
        assert_gradients_close(
            dict(zip(names, found, strict=True)), dict(zip(names, gradients, strict=True))
        )
    assert all(t.shape == (3, 5) for t in samples)


@pytest.mark.parametrize("active", [None, [0, 2, 5]], ids=["all", "some"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_folding_equals_batch_norm(training: bool, affine: bool, active: Any) -> None:
    idx = None if active is None else torch.tensor(active)
    chosen = torch.arange(7) if idx is None else idx
    k = len(chosen)
    y = torch.randn(3, k, 4, 2, dtype=torch.float64)
    mean, var = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.5
    gamma, beta = torch.randn(2, k, dtype=torch.float64) if affine else (None, None)
    mean_c, var_c = mean[chosen], var[chosen]
    wanted = F.batch_norm(y, mean_c, var_c, gamma, beta, training, 0.3, EPS)
    before = mean.clone(), var.clone()
    batch = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False) * 24
    empty = y.new_empty(0)
    *vectors, invstd = reference.norm_fold(
        *(batch if training else (empty, empty)), gamma, beta, mean, var, idx, 24, training, 0.3,
        EPS,
    )  # fmt: skip
    h = reference.norm_act_fwd(y, Norm(*vectors), False)
    assert_gradients_close({"h": h}, {"h": wanted})
    of = y.var((0, 2, 3), unbiased=False) if training else var[chosen]
    assert_gradients_close({"invstd": invstd}, {"invstd": (of + EPS).rsqrt()})
    got = {"mean": mean[chosen], "var": var[chosen]}
    assert_gradients_close(got, {"mean": mean_c, "var": var_c})
    rest = torch.ones(7, dtype=torch.bool).index_fill(0, chosen, False)
    for now, old in zip((mean, var), before, strict=True):
        assert_exact(now[rest], old[rest])
        assert training or torch.equal(now, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_good_as_torch(dtype: torch.dtype) -> None:
    problem = Problem(CASES["plain"], dtype)
    truth = Problem(CASES["plain"])
    for name in ("x", "weight", "bias"):
        setattr(truth, name, getattr(problem, name).detach().double())
    truth.norm = Norm(*(v.detach().double() for v in problem.norm))
    y, mean, m2 = problem.fwd(True, True)
    wide = torch.promote_types(dtype, torch.float32)
    assert (y.dtype, mean.dtype, m2.dtype) == (dtype, wide, wide)
    # as torch would: h in the accumulator's dtype, z and y in the tensors'
    h = (problem.x.to(wide) - _over(problem.norm.center)) * _over(problem.norm.scale)
    z = (h + _over(problem.norm.shift)).relu().to(dtype)
    own = F.conv2d(z, problem.weight, problem.bias, *problem.window)
    wanted = truth.active(True)
    assert_close_to_float64(y, own.detach(), wanted, "y")
    exact = y.double()
    assert_close_to_float64(mean, exact.mean((0, 2, 3)).to(wide), exact.mean((0, 2, 3)), "mean")
    centered = exact - _over(exact.mean((0, 2, 3)))
    squares = centered.square().sum((0, 2, 3))
    assert_close_to_float64(m2, squares.to(wide), squares, "m2")
    dx, dscale, _ = problem.dgrad(torch.randn_like(y), None, True)
    assert (dx.dtype, dscale.dtype) == (dtype, wide)
    assert problem.wgrad(torch.randn_like(y), None, True).dtype == dtype


def test_what_relu_cuts_off_does_not_spread_nan() -> None:
    """A gradient that is NaN where h < 0 is not read."""
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    norm = Norm(torch.ones(3).double(), torch.zeros(3).double(), torch.zeros(3).double())
    dz = torch.where(y > 0, 1.0, float("nan")).double()
    assert all(t.isfinite().all() for t in reference.norm_act_bwd(dz, y, norm, True, False))
    zeros = torch.zeros(3, dtype=torch.float64)
    grad = NormGrad(y, norm.center, zeros, zeros, norm, True)
    dw = reference.fused_conv2d_wgrad(dz, grad, y, None, [1, 1], [1, 1], [0, 0], [1, 1], 1)
    assert dw.isfinite().all()

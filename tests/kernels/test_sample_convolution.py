"""Convolution with channels of each sample's own, against a masked dense one in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.kernels.reference import sample_convolution as reference
from tolerances import assert_close_to_float64, assert_exact, assert_gradients_close

LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Case(NamedTuple):
    """One convolution; ``c`` or ``k`` None: all channels."""

    samples: int = 3
    C: int = 5
    K: int = 7
    c: int | None = 3
    k: int | None = 4
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C, *self.kernel


CASES = {
    "both": Case(),
    "out": Case(c=None),
    "in": Case(k=None),
    "neither": Case(c=None, k=None),
    "one": Case(c=1, k=1),
    "one-sample": Case(samples=1),
    "strided": Case(stride=(2, 3), padding=(0, 2)),
    "dilated": Case(kernel=(3, 2), dilation=(2, 3), padding=(2, 1)),
    "1x1": Case(C=17, K=3, c=9, k=2, kernel=(1, 1), padding=(0, 0)),
}
EMPTY = {
    "no-sample": Case(samples=0),
    "no-input": Case(c=0),
    "no-output": Case(k=0),
    "nothing": Case(c=0, k=0),
}


def _lists(count: int | None, channels: int, samples: int) -> Tensor | None:
    """Choose ``count`` channels for every sample, sorted."""
    if count is None:
        return None
    return torch.rand(samples, channels).argsort(1)[:, :count].sort(1).values


def _mask(idx: Tensor | None, channels: int, samples: int) -> Tensor:
    if idx is None:
        return torch.ones(samples, channels, 1, 1, dtype=torch.float64)
    mask = torch.zeros(samples, channels, dtype=torch.float64).scatter(1, idx, 1.0)
    return mask[:, :, None, None]


def _pick(dense: Tensor, idx: Tensor | None) -> Tensor:
    if idx is None:
        return dense
    return dense.gather(1, idx[:, :, None, None].expand(-1, -1, *dense.shape[2:]))


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    in_idx: Tensor | None
    out_idx: Tensor | None
    expected: dict[str, Tensor]


def _problem(
    case: Case, layout: torch.memory_format = torch.contiguous_format, dtype=torch.float64
) -> Problem:
    """Mask x per sample, convolve densely, pick winners; gradients through autograd."""
    in_idx = _lists(case.c, case.C, case.samples)
    out_idx = _lists(case.k, case.K, case.samples)
    dense = torch.randn(case.samples, case.C, 7, 6).to(dtype).double().requires_grad_()
    weight = torch.randn(case.weight_shape).to(dtype).double().requires_grad_()
    bias = torch.randn(case.K).to(dtype).double().requires_grad_()
    mask = _mask(in_idx, case.C, case.samples)
    y = _pick(F.conv2d(dense * mask, weight, bias, *case.geometry), out_idx)
    dy = torch.randn(y.shape).to(dtype).double()
    dx, dw, db = torch.autograd.grad(y, (dense, weight, bias), dy)
    x = _pick(dense.detach(), in_idx).to(dtype).contiguous(memory_format=layout)
    return Problem(
        x, weight.detach().to(dtype), bias.detach().to(dtype),
        dy.to(dtype).contiguous(memory_format=layout), in_idx, out_idx,
        {"y": y.detach(), "dx": _pick(dx, in_idx), "dw": dw, "db": db},
    )  # fmt: skip


def _ours(case: Case, p: Problem) -> dict[str, Tensor]:
    lists = (p.in_idx, p.out_idx, *case.geometry)
    return {
        "y": reference.sample_conv2d_fwd(p.x, p.weight, p.bias, *lists),
        "dx": reference.sample_conv2d_dgrad(p.dy, p.x, p.weight, *lists),
        "dw": reference.sample_conv2d_wgrad(p.dy, p.x, case.weight_shape, *lists),
        "db": reference.sample_bias_grad(p.dy, p.out_idx, case.K),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_masked_dense(case: Case, layout: torch.memory_format) -> None:
    problem = _problem(case, layout)
    ours = _ours(case, problem)
    assert_gradients_close(ours, problem.expected)
    assert ours["y"].is_contiguous(memory_format=layout)
    assert ours["dx"].is_contiguous(memory_format=layout)
    assert ours["dw"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    case = CASES["both"]
    problem = _problem(case, dtype=dtype)
    mask = _mask(problem.in_idx, case.C, case.samples).to(dtype)
    dense = torch.zeros(case.samples, case.C, 7, 6, dtype=dtype)
    where = problem.in_idx[:, :, None, None].expand_as(problem.x)
    dense = dense.scatter(1, where, problem.x).requires_grad_()
    weight, bias = problem.weight.clone().requires_grad_(), problem.bias.clone().requires_grad_()
    y = _pick(F.conv2d(dense * mask, weight, bias, *case.geometry), problem.out_idx)
    dx, dw, db = torch.autograd.grad(y, (dense, weight, bias), problem.dy)
    torchs = {"y": y.detach(), "dx": _pick(dx, problem.in_idx), "dw": dw, "db": db}
    for name, ours in _ours(case, problem).items():
        assert_close_to_float64(ours, torchs[name], problem.expected[name], name)


@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY.keys())
def test_nothing_to_convolve(case: Case) -> None:
    in_idx = _lists(case.c, case.C, case.samples)
    out_idx = _lists(case.k, case.K, case.samples)
    assert in_idx is not None and out_idx is not None
    x, dy = torch.randn(case.samples, case.c, 7, 6), torch.randn(case.samples, case.k, 7, 6)
    weight, bias = torch.randn(case.weight_shape), torch.randn(case.K)
    problem = Problem(x, weight, bias, dy, in_idx, out_idx, {})
    ours = _ours(case, problem)
    assert_exact(ours["y"], bias[out_idx][:, :, None, None].expand_as(dy).contiguous())
    assert_exact(ours["dx"], torch.zeros_like(x))
    assert_exact(ours["dw"], torch.zeros_like(weight))


def test_absent_pairs_are_zero_and_never_read() -> None:
    """NaN in weights that no sample needs stays there; their gradient is zero."""
    case = Case(samples=2, C=4, K=4, c=2, k=2)
    problem = _problem(case)
    in_idx, out_idx = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 3], [0, 3]])
    there = torch.zeros(4, 4, dtype=torch.bool)
    there[[0, 3]] = True
    weight = problem.weight.masked_fill(~there[:, :, None, None], torch.nan)
    bias = problem.bias.clone()
    bias[1:3] = torch.nan
    ours = _ours(case, problem._replace(weight=weight, bias=bias, in_idx=in_idx, out_idx=out_idx))
    for name, value in ours.items():
        assert value.isfinite().all(), name
    assert_exact(ours["dw"] != 0, there[:, :, None, None].expand_as(weight).contiguous())
    assert_exact(ours["db"] != 0, there[:, 0])


def test_lists_need_not_be_sorted() -> None:
    case = Case()
    problem = _problem(case)
    turned = problem._replace(
        x=problem.x.flip(1), dy=problem.dy.flip(1),
        in_idx=problem.in_idx.flip(1), out_idx=problem.out_idx.flip(1),
    )  # fmt: skip
    ours = _ours(case, turned)
    ours["y"], ours["dx"] = ours["y"].flip(1), ours["dx"].flip(1)
    assert_gradients_close(ours, problem.expected)

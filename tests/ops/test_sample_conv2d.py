"""Convolution with channels of its own for each sample: gradients, compiler, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dcx_kernels.ops.sample_conv2d import sample_conv2d
from tolerances import assert_gradients_close

OPS = torch.ops.dcx_kernels
N, C, K, c, k = 3, 5, 6, 2, 4


def lists() -> tuple[Tensor, Tensor]:
    """Draw the active channels of each sample."""
    drawn = (
        torch.stack([torch.randperm(n)[:kept].sort().values for _ in range(N)])
        for n, kept in ((C, c), (K, k))
    )
    return next(drawn), next(drawn)


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Draw compact x, the full weight and the full bias."""
    shapes = ((N, c, 5, 4), (K, C, 3, 3), (K,))
    x, weight, bias = (torch.randn(s, dtype=dtype).requires_grad_() for s in shapes)
    return x, weight, bias


def test_each_sample_is_a_convolution_of_its_slice() -> None:
    (x, weight, bias), (in_idx, out_idx) = operands(), lists()
    window: dict[str, Any] = {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}
    y = sample_conv2d(x, weight, bias, **window, in_idx=in_idx, out_idx=out_idx)
    each = [
        F.conv2d(x[n : n + 1], weight[out_idx[n]][:, in_idx[n]], bias[out_idx[n]], **window)
        for n in range(N)
    ]
    dy = torch.randn_like(y)
    names, wanted = ("x", "weight", "bias"), torch.cat(each)
    ours = torch.autograd.grad(y, (x, weight, bias), dy)
    theirs = torch.autograd.grad(wanted, (x, weight, bias), dy)
    assert_gradients_close(
        {"y": y, **dict(zip(names, ours, strict=True))},
        {"y": wanted, **dict(zip(names, theirs, strict=True))},
    )


@pytest.mark.parametrize("which", ["both", "in", "out", "none"])
def test_gradcheck(which: str) -> None:
    (x, weight, bias), (in_idx, out_idx) = operands(), lists()
    in_, out = in_idx, out_idx
    if which in ("out", "none"):
        in_, x = None, torch.randn(N, C, 5, 4, dtype=torch.float64, requires_grad=True)
    if which in ("in", "none"):
        out = None

    def run(*tensors: Tensor) -> Tensor:
        return sample_conv2d(*tensors, 2, 1, in_idx=in_, out_idx=out)

    assert torch.autograd.gradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_raw_operators_pass_opcheck(last: bool) -> None:
    (x, weight, bias), (in_idx, out_idx) = operands(torch.float32), lists()
    form = torch.channels_last if last else torch.contiguous_format
    x = x.detach().contiguous(memory_format=form)
    weight, bias = weight.detach(), bias.detach()
    window = ([1, 1], [1, 1], [1, 1])
    dy = torch.randn(N, k, 5, 4).contiguous(memory_format=form)
    for op, args in (
        (OPS.sample_conv2d_fwd, (x, weight, bias, in_idx, out_idx, *window)),
        (OPS.sample_conv2d_dgrad, (dy, x, weight, in_idx, out_idx, *window)),
        (OPS.sample_conv2d_wgrad, (dy, x, [K, C, 3, 3], in_idx, out_idx, *window)),
        (OPS.sample_bias_grad, (dy, out_idx, K)),
    ):
        results = torch.library.opcheck(op.default, args)
        assert set(results.values()) == {"SUCCESS"}


def test_counts_the_active_pairs() -> None:
    (x, weight, _), (in_idx, out_idx) = operands(), lists()
    with FlopCounterMode(display=False) as counter:
        sample_conv2d(x, weight, None, 1, 1, in_idx=in_idx, out_idx=out_idx).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * N * k * 5 * 4 * c * 9


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    (x, weight, bias), (in_idx, out_idx) = operands(), lists()
    compiled = torch.compile(sample_conv2d, backend="aot_eager", fullgraph=True)
    lists_ = {"in_idx": in_idx, "out_idx": out_idx}
    ours = compiled(x, weight, bias, 1, 1, **lists_)
    torch.testing.assert_close(ours, sample_conv2d(x, weight, bias, 1, 1, **lists_))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_idx": torch.zeros(N, c + 1, dtype=torch.int64)}, "in_idx: expected int64 of shape"),
        ({"out_idx": torch.zeros(N, k, dtype=torch.int32)}, "out_idx: expected int64 of shape"),
        ({"out_idx": torch.zeros(N + 1, k, dtype=torch.int64)}, "out_idx: expected int64 of shape"),
        ({"in_idx": None}, "x: expected x with 5 channels, got (3, 2, 5, 4)"),
        ({"bias": torch.zeros(k)}, "bias: expected 6 values, got (4,)"),
        ({"x": torch.zeros(N, c, 5)}, "expected 4-D x and weight"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    (x, weight, bias), (in_idx, out_idx) = operands(), lists()
    args = {"x": x, "weight": weight, "bias": bias, "in_idx": in_idx, "out_idx": out_idx, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_conv2d(**args)

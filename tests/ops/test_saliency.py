"""The probes: their gradient is the literal sum of (dL/dh) h, which plain torch computes here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_helpers import ConvCase, channels, indices_of, leaf, masked_conv2d
from dcx_kernels import ChannelSet, channel_batch_norm, channel_conv2d
from tolerances import assert_close_to_float64, assert_gradients_close

N, SIZE = 3, (4, 5)
REDUCTIONS = pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])


def _literal(h: Tensor, per_sample: bool) -> Tensor:
    """Sum of (dL/dh) h over pixels, and over the batch as well unless ``per_sample``."""
    literal = h.grad * h.detach()
    over = [dim for dim in range(h.dim()) if dim > 1 or (dim == 0 and not per_sample)]
    return literal.sum(over) if over else literal


def _probe(num_active: int, per_sample: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (N, num_active) if per_sample else (num_active,)
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


@REDUCTIONS
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [SIZE, (6,), ()], ids=["image", "line", "no-pixels"])
def test_channel_batch_norm_probe_equals_definition(
    size: tuple[int, ...], training: bool, relu: bool, affine: str, per_sample: bool
) -> None:
    mean, var, w, b = torch.randn(4, 7, dtype=torch.float64).unbind()
    weight, bias = (
        w if affine in ("both", "weight") else None,
        b if affine in ("both", "bias") else None,
    )
    active = ChannelSet([0, 2, 3, 6], 7)
    idx, var = active.indices, var.exp()
    x = torch.randn(N, 4, *size, dtype=torch.float64)
    probe = _probe(4, per_sample)
    y = channel_batch_norm(
        x.requires_grad_(), mean.clone(), var.clone(), weight, bias, training, eps=0.1,
        active=active, relu=relu, probe=probe,
    )  # fmt: skip
    h = F.batch_norm(
        x, mean[idx], var[idx], None if weight is None else w[idx],
        None if bias is None else b[idx], training, eps=0.1,
    )  # fmt: skip
    h.retain_grad()
    upstream = torch.randn_like(h)
    y.backward(upstream)
    (h.relu() if relu else h).backward(upstream)
    wanted = _literal(h, per_sample)
    assert probe.grad.shape == wanted.shape
    if affine == "neither" and training and not relu:
        assert wanted.abs().max() > 1e-3  # the comparison is not one of rounding noise
    assert_gradients_close({"saliency": probe.grad}, {"saliency": wanted})


CASES = [
    ConvCase("bias", 5, 6, [0, 3, 4], [1, 5], N=N, size=SIZE),
    ConvCase("no-bias", 5, 6, [0, 3, 4], [1, 5], N=N, size=SIZE, bias=False),
    ConvCase("all", 3, 2, N=N, size=SIZE),
    ConvCase("compact", 5, 6, [0, 3], None, N=N, size=SIZE, compact=True),
    ConvCase("groups", 6, 6, [1, 2, 5], [0, 3, 5], N=N, size=SIZE, groups=3),
    ConvCase("stride-same", 5, 6, [2], [0, 5], N=N, size=SIZE, options={"stride": 2, "padding": 1}),
]


@REDUCTIONS
@pytest.mark.parametrize("activation", ["none", "relu", "relu-inplace"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_channel_conv2d_probe_equals_definition(
    case: ConvCase, activation: str, per_sample: bool
) -> None:
    in_active, out_active = case.sets()
    x, weight, bias = (leaf(t) for t in case.tensors(in_active))
    options = {**case.options, "groups": case.groups}
    sets = {"in_active": in_active, "out_active": out_active}
    probe = _probe(len(indices_of(out_active, case.K)), per_sample)
    y = channel_conv2d(x, weight, bias, **options, **sets, probe=probe)
    z = masked_conv2d(x, weight, bias, in_active, out_active, **options)
    z.retain_grad()
    upstream = torch.randn_like(z)
    y = {"none": y, "relu": y.relu(), "relu-inplace": y}[activation]
    (y.relu_() if activation == "relu-inplace" else y).backward(upstream)
    (z if activation == "none" else z.relu()).backward(upstream)
    assert_gradients_close({"saliency": probe.grad}, {"saliency": _literal(z, per_sample)})


@REDUCTIONS
@pytest.mark.parametrize("frozen", ["weight", "all"])
def test_channel_conv2d_probe_with_frozen_parameters(frozen: str, per_sample: bool) -> None:
    case = CASES[0]
    in_active, out_active = case.sets()
    x, weight, bias = case.tensors(in_active)
    probe = _probe(2, per_sample)
    trainable = bias.clone().requires_grad_(frozen == "weight")
    y = channel_conv2d(
        x, weight, trainable, in_active=in_active, out_active=out_active, probe=probe
    )
    z = masked_conv2d(x, weight, bias, in_active, out_active).requires_grad_()
    y.square().sum().backward()
    z.square().sum().backward()
    assert_gradients_close({"saliency": probe.grad}, {"saliency": _literal(z, per_sample)})


@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["conv", "norm"])
def test_probe_is_accurate_in_low_precision(op: str, dtype: torch.dtype, per_sample: bool) -> None:
    x = torch.randn(N, 6, 9, 9).to(dtype)
    parameters = [torch.randn(8, 6, 3, 3).to(dtype) / 7, torch.randn(8).to(dtype)]
    if op == "norm":
        parameters = [torch.rand(6) + 0.5, torch.randn(6)]

    def run(to: torch.dtype, ours: bool) -> tuple[Tensor, Tensor]:
        inputs = [t.to(to) for t in parameters]
        if op == "norm":
            inputs = [t.to(torch.promote_types(to, torch.float32)) for t in parameters]
        k = len(inputs[1])
        probe = _probe(k, per_sample, torch.promote_types(to, torch.float32))
        xs = x.to(to).requires_grad_()
        if op == "norm" and ours:
            h = channel_batch_norm(xs, None, None, *inputs, True, probe=probe)
        elif op == "norm":
            h = F.batch_norm(xs, None, None, *inputs, training=True)
        elif ours:
            h = channel_conv2d(xs, *inputs, probe=probe)
        else:
            h = F.conv2d(xs, *inputs)
        h.retain_grad()
        torch.manual_seed(7)
        h.backward(torch.randn(h.shape).to(dtype).to(to))
        return probe.grad, h

    got, _ = run(dtype, ours=True)
    _, h = run(dtype, ours=False)
    accumulate = torch.promote_types(dtype, torch.float32)
    over = (2, 3) if per_sample else (0, 2, 3)
    torch_own = (h.grad.to(accumulate) * h.detach().to(accumulate)).sum(over)
    truth = _literal(run(torch.float64, ours=False)[1], per_sample)
    assert got.dtype == accumulate
    assert_close_to_float64(got, torch_own, truth)


def test_probe_leaves_the_result_as_it_is() -> None:
    case = CASES[0]
    in_active, out_active = case.sets()
    x, weight, bias = case.tensors(in_active)
    sets = {"in_active": in_active, "out_active": out_active}
    plain = channel_conv2d(x, weight, bias, **sets)
    for per_sample in (False, True):
        probe = _probe(2, per_sample)
        assert torch.equal(channel_conv2d(x, weight, bias, **sets, probe=probe), plain)
        assert channels(2, 6) is not None and probe.eq(0).all()

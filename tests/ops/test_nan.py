"""The headline: what is inactive is not computed, so NaN there reaches nothing. Masks give NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_helpers import ConvCase, backward, leaf, masked_conv2d, slice_mask
from dcx_kernels import ChannelSet, channel_batch_norm, channel_conv2d, channel_linear
from tolerances import assert_exact

NAN = float("nan")
CASES = [
    ConvCase("plain", 17, 9, 5, 4, options={"padding": 1}),
    ConvCase("channels_last", 17, 9, 5, 4, layout="channels_last"),
    ConvCase("one", 3, 5, 1, 1),
    ConvCase("same-even", 5, 6, 3, 4, kernel=(2, 4), options={"padding": "same"}),
    ConvCase("groups", 6, 9, [1, 2, 5], [0, 3, 8], groups=3, options={"stride": 2}),
    ConvCase("groups-gone", 8, 4, [0, 1, 4, 5], [0, 2], groups=4),
    ConvCase("depthwise", 17, 17, [0, 3, 16], [0, 3, 16], groups=17),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_channel_conv2d_never_reads_the_inactive(case: ConvCase) -> None:
    in_active, out_active = case.sets()
    sets = {"in_active": in_active, "out_active": out_active}
    options = {**case.options, "groups": case.groups}
    x, weight, bias = case.tensors(in_active)
    mask = slice_mask(weight.shape, in_active, out_active, case.groups)
    inactive = ~in_active.mask().view(1, -1, 1, 1)
    poisoned = (
        x.clone().masked_fill_(inactive, NAN),
        weight.masked_fill(~mask, NAN),
        bias.masked_fill(~out_active.mask(), NAN),
    )
    masked = masked_conv2d(*poisoned, in_active, None, **options)
    masked = masked * out_active.mask().view(1, -1, 1, 1)
    assert masked.isnan().any(), "the mask formula should not survive this"
    results: list[dict[str, Tensor]] = []
    for tensors in ((x, weight, bias), poisoned):
        leaves = dict(zip(("x", "weight", "bias"), map(leaf, tensors), strict=True))
        probes = [
            torch.zeros(s, dtype=x.dtype, requires_grad=True) for s in _probes(case, out_active)
        ]
        found: dict[str, Tensor] = {}
        for probe in probes:
            y = channel_conv2d(*leaves.values(), **options, **sets, probe=probe)
            found["y"] = y.detach()
            found.update(backward(y, torch.ones_like(y), {**leaves, f"p{probe.dim()}": probe}))
        results.append(found)
    for name, value in results[1].items():
        assert_exact(value, results[0][name], name)
        assert value.isfinite().all(), name


def _probes(case: ConvCase, out_active: ChannelSet) -> list[tuple[int, ...]]:
    return [(len(out_active),), (case.N, len(out_active))]


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channel_batch_norm_never_reads_the_inactive(
    training: bool, relu: bool, per_sample: bool
) -> None:
    active = ChannelSet([0, 2, 5], 7)
    inactive = ~active.mask()
    x = torch.randn(4, 3, 5, 2)
    clean = [torch.randn(7), torch.rand(7) + 0.5, torch.randn(7), torch.randn(7)]
    poisoned = [v.masked_fill(inactive, NAN) for v in clean]
    dense = torch.randn(4, 7, 5, 2)
    masked = F.batch_norm(dense, None, None, *poisoned[2:], training=True)
    assert (masked * active.mask().view(1, 7, 1, 1)).isnan().any()
    results = []
    for vectors in (clean, poisoned):
        mean, var, weight, bias = (v.clone() for v in vectors)
        shape = (4, 3) if per_sample else (3,)
        leaves = {
            "x": leaf(x), "weight": leaf(weight), "bias": leaf(bias),
            "probe": torch.zeros(shape, requires_grad=True),
        }  # fmt: skip
        y = channel_batch_norm(
            leaves["x"], mean, var, leaves["weight"], leaves["bias"], training,
            active=active, relu=relu, probe=leaves["probe"],
        )  # fmt: skip
        found = {"y": y.detach(), **backward(y, torch.ones_like(y) + x, leaves)}
        found |= {"mean": mean[active.indices], "var": var[active.indices]}
        assert_exact(mean[inactive], vectors[0][inactive], "running mean of inactive channels")
        assert_exact(var[inactive], vectors[1][inactive], "running variance of inactive channels")
        assert torch.equal(found["mean"], clean[0][active.indices]) is not training
        results.append(found)
    for name, value in results[1].items():
        assert_exact(value, results[0][name], name)
        assert value.isfinite().all(), name


@pytest.mark.parametrize("inner", [1, 4])
def test_channel_linear_never_reads_the_inactive(inner: int) -> None:
    in_active, out_active = ChannelSet([0, 3], 5), ChannelSet([1, 2], 6)
    columns = in_active.mask().repeat_interleave(inner)
    x, weight, bias = torch.randn(3, 5 * inner), torch.randn(6, 5 * inner), torch.randn(6)
    mask = out_active.mask().unsqueeze(1) & columns
    poisoned = (
        x.masked_fill(~columns, NAN),
        weight.masked_fill(~mask, NAN),
        bias.masked_fill(~out_active.mask(), NAN),
    )
    masked = F.linear(poisoned[0] * columns, *poisoned[1:])[:, out_active.indices]
    assert masked.isnan().all()
    results = []
    for tensors in ((x, weight, bias), poisoned):
        leaves = dict(zip(("x", "weight", "bias"), map(leaf, tensors), strict=True))
        y = channel_linear(
            *leaves.values(), in_active=in_active, out_active=out_active, inner=inner
        )
        results.append({"y": y.detach(), **backward(y, torch.ones_like(y), leaves)})
    for name, value in results[1].items():
        assert_exact(value, results[0][name], name)
        assert value.isfinite().all(), name

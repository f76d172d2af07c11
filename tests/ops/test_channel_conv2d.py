"""channel_conv2d equals its definition: outputs, all gradients, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from channel_helpers import ConvCase, backward, channels, leaf, masked_conv2d, slice_mask
from dcx_kernels import ChannelSet, channel_conv2d
from tolerances import assert_exact, assert_gradients_close

SAME, VALID = {"padding": "same"}, {"padding": "valid"}
CASES = [
    ConvCase("C1-K1", 1, 1, 1, 1),
    ConvCase("all-as-None", 3, 4),
    ConvCase("all-listed", 3, 4, 3, 4, options={"padding": 1}),
    ConvCase("in-only", 17, 4, 5, None, options={"padding": 1}),
    ConvCase("out-only", 3, 17, None, 5, bias=False),
    ConvCase("one-active", 63, 17, 1, 1, options={"padding": 1}),
    ConvCase("C63-K100", 63, 100, 17, 63, N=1, options={"padding": (1, 0)}),
    ConvCase("C100-K63-1x1", 100, 63, 63, 17, kernel=(1, 1)),
    ConvCase("stride-2", 5, 6, 3, 4, size=(9, 8), options={"stride": 2, "padding": 1}),
    ConvCase("stride-2x3", 5, 6, 3, 4, size=(9, 8), kernel=(1, 1), options={"stride": (2, 3)}),
    ConvCase("dilation-2", 5, 6, 3, 4, size=(9, 8), options={"dilation": 2, "padding": 2}),
    ConvCase("dilation-1x2", 5, 6, 3, 4, size=(9, 8), options={"dilation": (1, 2)}),
    ConvCase("kernel-5x1", 5, 6, 3, 4, size=(9, 8), kernel=(5, 1), options={"padding": (2, 0)}),
    ConvCase("same", 5, 6, 3, 4, options=SAME),
    ConvCase("same-even", 5, 6, 3, 4, kernel=(2, 4), options=SAME),
    ConvCase("same-even-dilated", 5, 6, 3, 4, kernel=(2, 3), options={**SAME, "dilation": 3}),
    ConvCase("valid", 5, 6, 3, 4, options=VALID),
    ConvCase("groups", 6, 9, [1, 2, 5], [0, 2, 3, 4, 7, 8], groups=3),
    ConvCase("groups-gone", 8, 4, [0, 1, 4, 5], [0, 2], groups=4, options={"padding": 1}),
    ConvCase("groups-all-in", 6, 9, None, [0, 3, 8], groups=3, bias=False),
    ConvCase("groups-all-out", 6, 9, [1, 2, 5], None, groups=3),
    ConvCase("groups-stride", 6, 9, [1, 2, 5], [0, 3, 8], groups=3, options={"stride": 2}),
    ConvCase("depthwise", 17, 17, [0, 3, 16], [0, 3, 16], groups=17, options=SAME),
    ConvCase("depthwise-one", 5, 5, [4], [4], groups=5),
    ConvCase("multiplier-2", 4, 8, [0, 3], [0, 1, 6, 7], groups=4),
    ConvCase("multiplier-2-thin", 4, 8, [0, 3], [1, 6], groups=4),
    ConvCase("batch-1", 5, 6, 3, 4, N=1),
    ConvCase("batch-0", 5, 6, 3, 4, N=0),
    ConvCase("pixel-1", 5, 6, 3, 4, size=(1, 1), options={"padding": 1}),
]
ODD = ["in-only", "one-active", "stride-2", "same-even", "groups-gone", "depthwise", "batch-0"]
BY_ID = {case.id: case for case in CASES}
VARIANTS = [
    *CASES,
    *(BY_ID[i].also(id=f"{i}-compact", compact=True) for i in ODD),
    *(BY_ID[i].also(id=f"{i}-channels_last", layout="channels_last") for i in ODD),
    *(BY_ID[i].also(id=f"{i}-strided", layout="strided") for i in ODD),
    *(BY_ID[i].also(id=f"{i}-unbatched", layout="unbatched") for i in ODD[:-1]),
    BY_ID["in-only"].also(id="in-only-compact-strided", compact=True, layout="strided"),
    BY_ID["groups"].also(id="groups-compact-channels_last", compact=True, layout="channels_last"),
]


def _both(case: ConvCase) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Any]]:
    """Return results and gradients of the operator and of its definition, and the slice's mask."""
    in_active, out_active = case.sets()
    tensors = case.tensors(in_active)
    options = {**case.options, "groups": case.groups}
    mine = dict(zip(("x", "weight", "bias"), map(leaf, tensors), strict=True))
    theirs = dict(zip(("x", "weight", "bias"), map(leaf, tensors), strict=True))
    y = channel_conv2d(*mine.values(), **options, in_active=in_active, out_active=out_active)
    expected = masked_conv2d(*theirs.values(), in_active, out_active, **options)
    upstream = torch.randn_like(expected)
    got = {"y": y.detach(), **backward(y, upstream, mine)}
    wanted = {"y": expected.detach(), **backward(expected, upstream, theirs)}
    mask = slice_mask(tensors[1].shape, in_active, out_active, case.groups)
    return got, wanted, mask, {"in": in_active, "out": out_active}


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.id)
def test_channel_conv2d_equals_definition(case: ConvCase) -> None:
    got, wanted, mask, sets = _both(case)
    assert_gradients_close({"y": got.pop("y")}, {"y": wanted.pop("y")})
    assert_gradients_close(got, wanted)
    assert got["weight"][~mask].eq(0).all(), "a gradient outside the active slice"
    if case.bias and sets["out"] is not None:
        assert got["bias"][~sets["out"].mask()].eq(0).all()
    if sets["in"] is not None and not case.compact:
        dx = got["x"].movedim(-3, 0)
        assert dx[~sets["in"].mask()].eq(0).all()


@pytest.mark.parametrize(
    "case",
    [
        ConvCase("plain", 4, 3, [0, 3], [1, 2], N=1, size=(3, 3), options={"padding": 1}),
        ConvCase("stride", 4, 3, [0, 3], [2], N=1, size=(4, 3), options={"stride": 2}),
        ConvCase("groups", 4, 4, [0, 3], [1, 2], N=1, size=(3, 3), groups=2),
        ConvCase("same-even", 2, 2, [1], [0], N=1, size=(3, 2), kernel=(2, 2), options=SAME),
        ConvCase("compact", 4, 3, [0, 3], [1, 2], N=1, size=(3, 3), compact=True),
    ],
    ids=lambda case: case.id,
)
def test_channel_conv2d_gradcheck(case: ConvCase) -> None:
    in_active, out_active = case.sets()
    tensors = [leaf(t) for t in case.tensors(in_active)]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return channel_conv2d(
            x, weight, bias, **case.options, groups=case.groups,
            in_active=in_active, out_active=out_active,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_channel_conv2d_skips_unneeded_gradients(needed: str) -> None:
    case = BY_ID["stride-2"]
    in_active, out_active = case.sets()
    tensors = dict(zip(("x", "weight", "bias"), case.tensors(in_active), strict=True))
    y_all = {n: leaf(t) for n, t in tensors.items()}
    sets = {"in_active": in_active, "out_active": out_active}
    channel_conv2d(*y_all.values(), **case.options, **sets).square().sum().backward()
    tensors[needed].requires_grad_()
    channel_conv2d(*tensors.values(), **case.options, **sets).square().sum().backward()
    assert_exact(tensors[needed].grad, y_all[needed].grad)
    assert all(t.grad is None for n, t in tensors.items() if n != needed)


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_channel_conv2d_follows_the_input_layout(compact: bool) -> None:
    case = ConvCase("layout", 16, 12, 7, 5, layout="channels_last", compact=compact)
    in_active, out_active = case.sets()
    x, weight, bias = (leaf(t) for t in case.tensors(in_active))
    y = channel_conv2d(x, weight, bias, in_active=in_active, out_active=out_active)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.is_contiguous()


def test_channel_conv2d_is_differentiable_once() -> None:
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    y = channel_conv2d(x, torch.randn(3, 2, 1, 1), out_active=ChannelSet([1], 3))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_channel_conv2d_packed_takes_the_slice() -> None:
    case = ConvCase("packed", 6, 9, [1, 2, 5], [0, 3, 8], groups=3, options={"padding": 1})
    in_active, out_active = case.sets()
    x, weight, bias = case.tensors(in_active)
    sets = {"in_active": in_active, "out_active": out_active}
    mask = slice_mask(weight.shape, in_active, out_active, case.groups)
    full, full_bias = leaf(weight), leaf(bias)
    small, small_bias = leaf(weight[mask].view(3, 1, 3, 3)), leaf(bias[out_active.indices])
    y = channel_conv2d(x, full, full_bias, 1, 1, 1, 3, **sets)
    packed = channel_conv2d(x, small, small_bias, 1, 1, 1, 3, **sets, packed=True)
    assert_exact(packed, y)
    y.square().sum().backward()
    packed.square().sum().backward()
    assert_exact(small.grad.flatten(), full.grad[mask])
    assert_exact(small_bias.grad, full_bias.grad[out_active.indices])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (2, 5, 6, 6)}, r"x: expected 4 \(dense\) or 2 \(compact\) input channels, got 5"),
        ({"x": (2, 6)}, r"x of shape \(N, C, H, W\) or \(C, H, W\), got \(2, 6\)"),
        ({"weight": (6, 5, 3, 3)}, "weight: expected a weight for 4 input channels in 1 groups"),
        ({"weight": (6, 4, 3)}, r"expected a \(K, C / groups, R, S\) weight, got \(6, 4, 3\)"),
        ({"out": ChannelSet([0], 5)}, "weight: expected out_active of 6 channels, got 5"),
        ({"bias": (5,)}, r"bias: expected 6 values, got \(5,\)"),
        ({"bias": (7,)}, r"bias: expected 6 values, got \(7,\)"),
        ({"padding": "some"}, "expected padding 'same', 'valid' or numbers, got 'some'"),
        ({"padding": "same", "stride": 2}, r"expected stride 1 with padding='same', got \(2, 2\)"),
        ({"padding": "same", "stride": (1, 2)}, "expected stride 1 with padding='same'"),
        ({"groups": 3}, "expected a weight for 4 input channels in 3 groups"),
        (
            {"groups": 4, "weight": (6, 1, 3, 3)},
            "weight: expected output channels in 4 equal groups, got 6",
        ),
        (
            {"groups": 2, "weight": (6, 2, 3, 3), "in": ChannelSet([0, 1, 2], 4)},
            r"expected equal active in channels in each of 2 groups, got \[2, 1\]",
        ),
        (
            {"groups": 2, "weight": (6, 2, 3, 3), "in": None},
            r"expected equal active out channels in each of 2 groups, got \[2, 1\]",
        ),
        (
            {"groups": 2, "weight": (6, 2, 3, 3), "out": ChannelSet([1, 2], 6)},
            r"active on both sides or on none \(2 groups\), got in \(1, 1\), out \(2, 0\)",
        ),
        (
            {"groups": 2, "weight": (6, 2, 3, 3), "out": None, "in": ChannelSet([2], 4)},
            r"active on both sides or on none \(2 groups\), got in \(0, 1\), out all",
        ),
    ],
)
def test_channel_conv2d_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": (2, 4, 6, 6), "weight": (6, 4, 3, 3), "bias": (6,), "stride": 1, "padding": 1,
        "groups": 1, "in": ChannelSet([0, 3], 4), "out": ChannelSet([1, 2, 5], 6), **changes,
    }  # fmt: skip
    x, weight, bias = (torch.randn(arguments[n]) for n in ("x", "weight", "bias"))
    with pytest.raises(ValueError, match=message):
        channel_conv2d(
            x, weight, bias, arguments["stride"], arguments["padding"], 1, arguments["groups"],
            in_active=arguments["in"], out_active=arguments["out"],
        )  # fmt: skip


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_channel_conv2d_backward_uses_its_own_sets(compact: bool) -> None:
    weight, bias = torch.randn(6, 5, 3, 3).double(), torch.randn(6).double()
    leaves, definition = [leaf(weight), leaf(bias)], [leaf(weight), leaf(bias)]
    results, expected = [], []
    for in_, out in (([0, 3], [1, 2]), ([4], [0, 2, 5]), ([1, 2, 3], [1])):
        sets = channels(in_, 5), channels(out, 6)
        x = torch.randn(2, len(in_) if compact else 5, 4, 4, dtype=torch.float64)
        results.append(channel_conv2d(x, *leaves, in_active=sets[0], out_active=sets[1]))
        expected.append(masked_conv2d(x, *definition, *sets))
    for y, wanted in zip(results, expected, strict=True):  # all forwards came first
        y.square().sum().backward()
        wanted.square().sum().backward()
    assert_gradients_close(
        dict(zip("wb", (t.grad for t in leaves), strict=True)),
        dict(zip("wb", (t.grad for t in definition), strict=True)),
    )

"""channel_linear equals its definition: outputs, all gradients, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_helpers import Wanted, backward, channels, indices_of, leaf, mask_of, spread
from dcx_kernels import ChannelSet, channel_linear
from tolerances import assert_exact, assert_gradients_close

# C, K, in, out, inner, batch
CASES: dict[str, tuple[int, int, Wanted, Wanted, int, tuple[int, ...]]] = {
    "C1-K1": (1, 1, 1, 1, 1, (3,)),
    "all-as-None": (5, 4, None, None, 1, (3,)),
    "all-listed": (3, 4, 3, 4, 1, (3,)),
    "in-only": (63, 10, 17, None, 1, (3,)),
    "out-only": (17, 100, None, 63, 1, (3,)),
    "one-active": (100, 17, 1, 1, 1, (3,)),
    "both": (9, 6, 4, 2, 1, (3,)),
    "inner-4": (9, 6, 4, 2, 4, (3,)),
    "inner-49-one": (3, 6, [2], None, 49, (3,)),
    "inner-all-in": (5, 6, None, 2, 4, (3,)),
    "no-batch": (9, 6, 4, 2, 2, ()),
    "batch-1": (9, 6, 4, 2, 1, (1,)),
    "batch-0": (9, 6, 4, 2, 2, (0,)),
    "batch-2x3": (9, 6, 4, 2, 2, (2, 3)),
}


def _masked(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    in_: ChannelSet | None,
    out: ChannelSet | None,
    inner: int,
) -> Tensor:
    """The definition in the docstring of `channel_linear`; a compact x is made dense first."""
    features = w.shape[1]
    if in_ is not None:
        mask = mask_of(in_, features // inner).repeat_interleave(inner)
        if x.shape[-1] == features:
            x = x * mask
        else:
            x = x.new_zeros(*x.shape[:-1], features).index_copy(-1, mask.nonzero().flatten(), x)
    return F.linear(x, w, b)[..., indices_of(out, w.shape[0])]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["dense", "compact", "strided"])
@pytest.mark.parametrize(
    ("C", "K", "in_", "out", "inner", "batch"), CASES.values(), ids=CASES.keys()
)
def test_channel_linear_equals_definition(
    C: int, K: int, in_: Wanted, out: Wanted, inner: int, batch: tuple[int, ...],  # noqa: N803
    kind: str, bias: bool,
) -> None:  # fmt: skip
    in_active, out_active = channels(in_, C), channels(out, K)
    count = len(in_active) if in_active is not None and kind == "compact" else C
    x = torch.randn(*batch, count * inner, dtype=torch.float64)
    x = spread(x) if kind == "strided" else x
    tensors = (x, torch.randn(K, C * inner).double(), torch.randn(K).double() if bias else None)
    mine = dict(zip(("x", "weight", "bias"), map(leaf, tensors), strict=True))
    theirs = dict(zip(("x", "weight", "bias"), map(leaf, tensors), strict=True))
    y = channel_linear(*mine.values(), in_active=in_active, out_active=out_active, inner=inner)
    expected = _masked(*theirs.values(), in_active, out_active, inner)
    upstream = torch.randn_like(expected)
    assert_gradients_close({"y": y}, {"y": expected})
    got = backward(y, upstream, mine)
    assert_gradients_close(got, backward(expected, upstream, theirs))
    columns = mask_of(in_active, C).repeat_interleave(inner)
    rows = mask_of(out_active, K)
    assert got["weight"][~rows].eq(0).all() and got["weight"][:, ~columns].eq(0).all()
    assert not bias or got["bias"][~rows].eq(0).all()
    assert kind == "compact" or got["x"][..., ~columns].eq(0).all()


@pytest.mark.parametrize("inner", [1, 3])
def test_channel_linear_gradcheck(inner: int) -> None:
    in_active, out_active = ChannelSet([0, 2], 3), ChannelSet([1, 3], 4)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return channel_linear(
            x, weight, bias, in_active=in_active, out_active=out_active, inner=inner
        )

    shapes = ((2, 3 * inner), (4, 3 * inner), (4,))
    assert torch.autograd.gradcheck(run, [leaf(torch.randn(s).double()) for s in shapes])


def test_channel_linear_packed_takes_the_slice() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 16), torch.randn(5)
    in_active, out_active = ChannelSet([1, 2], 4), ChannelSet([0, 4], 5)
    sets = {"in_active": in_active, "out_active": out_active, "inner": 4}
    rows, columns = out_active.indices, in_active.mask().repeat_interleave(4)
    full, full_bias = leaf(weight), leaf(bias)
    small, small_bias = leaf(weight[rows][:, columns]), leaf(bias[rows])
    y = channel_linear(x, full, full_bias, **sets)
    packed = channel_linear(x, small, small_bias, **sets, packed=True)
    assert_exact(packed, y)
    y.square().sum().backward()
    packed.square().sum().backward()
    assert_exact(small.grad, full.grad[rows][:, columns])
    assert_exact(small_bias.grad, full_bias.grad[rows])


def test_channel_linear_backward_uses_its_own_sets() -> None:
    weight = torch.randn(6, 5).double()
    mine, theirs, results = leaf(weight), leaf(weight), []
    for in_, out in (([0, 3], [1, 2]), ([4], [0, 2, 5])):
        sets = ChannelSet(in_, 5), ChannelSet(out, 6)
        x = torch.randn(3, 5, dtype=torch.float64)
        y = channel_linear(x, mine, in_active=sets[0], out_active=sets[1])
        results.append((y, _masked(x, theirs, None, *sets, 1)))
    for y, expected in results:
        y.square().sum().backward()
        expected.square().sum().backward()
    assert_gradients_close({"w": mine.grad}, {"w": theirs.grad})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (3, 9)}, r"x: expected 12 \(dense\) or 6 \(compact\) features, got 9"),
        ({"weight": (5, 9)}, r"weight: expected a \(K, 12\) weight, got \(5, 9\)"),
        ({"weight": (5, 12, 1)}, r"weight: expected a \(K, 12\) weight, got \(5, 12, 1\)"),
        ({"bias": (4,)}, r"bias: expected 5 values, got \(4,\)"),
        ({"out": ChannelSet([0], 4)}, "weight: expected out_active of 5 channels, got 4"),
        ({"in": None, "x": (3, 6)}, r"weight: expected a \(K, 6\) weight, got \(5, 12\)"),
    ],
)
def test_channel_linear_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": (3, 12), "weight": (5, 12), "bias": (5,),
        "in": ChannelSet([0, 3], 4), "out": ChannelSet([1, 2], 5), **changes,
    }  # fmt: skip
    tensors = (torch.randn(arguments[n]) for n in ("x", "weight", "bias"))
    sets = {"in_active": arguments["in"], "out_active": arguments["out"]}
    with pytest.raises(ValueError, match=message):
        channel_linear(*tensors, **sets, inner=3)

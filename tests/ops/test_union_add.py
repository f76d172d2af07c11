"""union_add is the sum of both terms made dense, on the channels that either has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from channel_helpers import leaf, spread
from dcx_kernels.ops.union_add import union_add
from tolerances import assert_close_to_float64, assert_exact

CASES = [  # channels, of the first term, of the second
    (1, [0], [0]),
    (3, [0, 1, 2], [1]),
    (3, [2], [0, 1, 2]),
    (5, [0, 4], [1, 3]),
    (17, list(range(0, 17, 2)), list(range(0, 17, 3))),
    (3, [], [0, 2]),
    (3, [1], []),
]
LAYOUTS = ["NCHW", "NHWC", "strided", "NC"]


def _term(channels: int, layout: str, dtype: torch.dtype) -> Tensor:
    shape = (2, channels) if layout == "NC" else (2, channels, 4, 3)
    x = torch.randn(shape, dtype=dtype)
    if layout == "NHWC":
        return x.contiguous(memory_format=torch.channels_last)
    return spread(x) if layout == "strided" else x


def _places(channels: list[int], union: list[int]) -> Tensor:
    return torch.tensor([union.index(c) for c in channels], dtype=torch.int64)


def _definition(a: Tensor, b: Tensor, in_a: list[int], in_b: list[int], union: list[int]) -> Tensor:
    """Add the terms channel by channel, from zeros."""
    planes = []
    for channel in union:
        plane = torch.zeros_like((a if in_a else b)[:, 0])
        if channel in in_a:
            plane = plane + a[:, in_a.index(channel)]
        if channel in in_b:
            plane = plane + b[:, in_b.index(channel)]
        planes.append(plane)
    return torch.stack(planes, 1)


@pytest.mark.parametrize("layouts", [(x, x) for x in LAYOUTS] + [("NCHW", "NHWC")], ids=str)
@pytest.mark.parametrize(("num_channels", "in_a", "in_b"), CASES)
def test_union_add_and_its_gradients_equal_the_dense_sum(
    num_channels: int, in_a: list[int], in_b: list[int], layouts: tuple[str, str]
) -> None:
    union = sorted({*in_a, *in_b})
    terms = [
        leaf(_term(len(c), layout, torch.float64))
        for c, layout in zip((in_a, in_b), layouts, strict=True)
    ]
    again = [leaf(t) for t in terms]
    y = union_add(*terms, _places(in_a, union), _places(in_b, union), len(union))
    expected = _definition(*again, in_a, in_b, union)
    assert_exact(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    for mine, theirs in zip(terms, again, strict=True):
        # a term without channels has no part in the definition
        assert_exact(mine.grad, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_union_add_promotes_as_torch_does(dtypes: tuple[str, str]) -> None:
    a, b = (torch.randn(2, 3, 4, 4).to(getattr(torch, name)) for name in dtypes)
    places = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3])
    y = union_add(a, b, *places, 4)
    assert y.dtype == torch.promote_types(a.dtype, b.dtype)
    dense = [torch.zeros(2, 4, 4, 4, dtype=t.dtype).index_copy(1, i, t) for t, i in
             zip((a, b), places, strict=True)]  # fmt: skip
    truth = dense[0].double() + dense[1].double()
    assert_close_to_float64(y, dense[0] + dense[1], truth)


def test_union_add_does_not_touch_its_terms() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    before = a.clone(), b.clone()
    union_add(a, b, torch.arange(3), torch.tensor([1]), 3)
    assert_exact(a, before[0])
    assert_exact(b, before[1])


def test_union_add_passes_gradcheck() -> None:
    places = torch.tensor([0, 2]), torch.tensor([1, 2])
    terms = [torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: union_add(a, b, *places, 3), terms)

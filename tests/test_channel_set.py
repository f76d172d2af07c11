"""ChannelSet: what it accepts, what it refuses, and that nothing changes afterwards."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st

from dcx_kernels import ChannelSet
from dcx_kernels.channel_set import agree, mark_any_length


@pytest.mark.parametrize(
    ("indices", "num_channels", "message"),
    [
        ([1, 3, 1], 4, "expected unique channel indices, got 1 more than once"),
        ([0, -2], 4, r"expected channel indices in \[0, 4\), got -2"),
        ([0, 4], 4, r"expected channel indices in \[0, 4\), got 4"),
        ([-1, 9], 4, r"in \[0, 4\), got -1"),
        ([], 4, "expected at least one active channel, got an empty list"),
        (torch.tensor([], dtype=torch.int64), 4, "expected at least one active channel"),
        ([0.0, 1.0], 4, "expected integer channel indices, got"),
        ([True, False], 4, "expected integer channel indices, got"),
        (["a"], 4, "expected integer channel indices, got"),
        (torch.tensor([0.0, 1.0]), 4, "integer channel indices, got dtype torch.float32"),
        (torch.tensor([True, False]), 2, "integer channel indices, got dtype torch.bool"),
        (torch.tensor([[0, 1]]), 4, r"expected 1-D channel indices, got shape \(1, 2\)"),
        (torch.tensor(0), 4, r"expected 1-D channel indices, got shape \(\)"),
        ([0], 0, "expected num_channels to be a positive int, got 0"),
        ([0], -3, "expected num_channels to be a positive int, got -3"),
        ([0], 4.0, "expected num_channels to be a positive int, got 4.0"),
        ([0], True, "expected num_channels to be a positive int, got True"),
    ],
)
def test_channel_set_refuses(indices: Any, num_channels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelSet(indices, num_channels)


@pytest.mark.parametrize(
    "indices",
    [
        [5, 0, 3],
        (3, 5, 0),
        iter([5, 0, 3]),
        torch.tensor([5, 0, 3]),
        torch.tensor([5, 0, 3], dtype=torch.int32),
        torch.tensor([3, 0, 5], dtype=torch.uint8),
    ],
    ids=["list", "tuple", "iterator", "int64", "int32", "uint8"],
)
def test_channel_set_sorts(indices: Any) -> None:
    s = ChannelSet(indices, 8)
    assert s.indices.tolist() == [0, 3, 5]
    assert s.indices.dtype == torch.int64
    assert len(s) == 3
    assert s.density == 3 / 8
    assert not s.is_full


def test_channel_set_owns_its_indices() -> None:
    given_indices = torch.tensor([0, 3, 5])
    s = ChannelSet(given_indices, 8)
    given_indices[0] = 7
    assert s.indices.tolist() == [0, 3, 5]


@pytest.mark.parametrize("name", ["indices", "num_channels", "_inverse", "new"])
def test_channel_set_is_frozen(name: str) -> None:
    s = ChannelSet([0, 3], 8)
    with pytest.raises(AttributeError, match=f"frozen: cannot set '{name}'"):
        setattr(s, name, None)
    assert s.num_channels == 8


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_inverse_inverts(sizes: tuple[int, set[int]]) -> None:
    num_channels, chosen = sizes[0], sizes[1] or {0}
    s = ChannelSet(list(chosen), num_channels)
    inverse = s.inverse.tolist()
    assert len(inverse) == num_channels
    assert [c for c in range(num_channels) if inverse[c] >= 0] == sorted(chosen)
    assert all(s.indices[inverse[c]] == c for c in chosen)
    assert all(inverse[c] == -1 for c in range(num_channels) if c not in chosen)
    assert s.mask().tolist() == [c in chosen for c in range(num_channels)]
    assert s.mask().dtype == torch.bool
    assert ChannelSet.from_mask(s.mask()) == s


def test_full_holds_all() -> None:
    full = ChannelSet.full(5)
    assert full.indices.tolist() == [0, 1, 2, 3, 4]
    assert full.is_full and full.density == 1.0
    assert full == ChannelSet(range(5), 5)


def test_trusted_does_not_look() -> None:
    indices = torch.tensor([1, 4])
    assert ChannelSet.trusted(indices, 6).indices is indices


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([1, 0]), "expected a 1-D bool mask, got 1-D torch.int64"),
        (torch.tensor([[True]]), "expected a 1-D bool mask, got 2-D torch.bool"),
        (torch.tensor([False, False]), "expected at least one active channel"),
    ],
)
def test_from_mask_refuses(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelSet.from_mask(mask)


def test_equality_is_by_value() -> None:
    s = ChannelSet([0, 3], 8)
    assert s == ChannelSet([3, 0], 8)
    assert hash(s) == hash(ChannelSet([3, 0], 8))
    assert s != ChannelSet([0, 3], 9)
    assert s != ChannelSet([0, 4], 8)
    assert s != ChannelSet([0], 8)
    assert s != [0, 3]
    assert len({s, ChannelSet([0, 3], 8), ChannelSet([1, 3], 8)}) == 2


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_channel_set_pickles(protocol: int) -> None:
    s = ChannelSet([0, 3, 5], 8)
    s.inverse, s.counts_per_group(2)  # what is remembered stays behind
    again = pickle.loads(pickle.dumps(s, protocol))
    assert again == s
    assert again.inverse.tolist() == s.inverse.tolist()


def test_channel_set_copies_are_itself() -> None:
    s = ChannelSet([0, 3], 8)
    assert copy.deepcopy(s) is s
    assert copy.copy(s) == s


def test_to_moves_once() -> None:
    s = ChannelSet([0, 3], 8)
    assert s.to("cpu") is s
    moved = s.to("meta")
    assert moved.indices.device.type == "meta"
    assert (len(moved), moved.num_channels) == (2, 8)
    assert s.to(torch.device("meta")) is moved
    assert s.indices.device.type == "cpu"


@pytest.mark.parametrize(
    ("groups", "counts"), [(1, (4,)), (2, (3, 1)), (4, (2, 1, 0, 1)), (8, (1, 1, 1, 0, 0, 0, 1, 0))]
)
def test_counts_per_group_counts(groups: int, counts: tuple[int, ...]) -> None:
    s = ChannelSet([0, 1, 2, 6], 8)
    assert s.counts_per_group(groups) == counts
    assert s.counts_per_group(groups) is s.counts_per_group(groups)
    s.to("meta")  # remembered beside it, never instead of it
    assert s.counts_per_group(groups) == counts


def test_repr_shows_the_first() -> None:
    assert repr(ChannelSet([5, 0, 3], 8)) == "ChannelSet([0, 3, 5], 3 of 8)"
    assert repr(ChannelSet(range(9), 16)) == "ChannelSet([0, 1, 2, 3, 4, 5, 6, 7, ...], 9 of 16)"


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_marks_are_those_of_torch(dims: tuple[int, ...]) -> None:
    torch_marks = torch.ones(2, 3)
    torch._dynamo.decorators.mark_unbacked(torch_marks, dims)
    for shape in ((2, 3), (1, 1)):
        tensor = torch.ones(shape)
        mark_any_length(tensor, *dims)
        assert vars(tensor) == vars(torch_marks) and tensor.is_contiguous()
    unmarked = torch.ones(2)
    mark_any_length(unmarked)
    assert not vars(unmarked)


def test_marked_tensors_without_elements_have_the_strides_of_others() -> None:
    for shape in ((2, 0, 3, 3), (0, 2, 1, 1), (3, 0)):
        tensor = torch.empty(shape)
        mark_any_length(tensor, 0, 1)
        assert list(tensor.stride()) == [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def test_lengths_agree_when_equal() -> None:
    assert agree(3, 3) and not agree(3, 4)

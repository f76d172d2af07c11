"""Numbers of channels: what becomes one, what is a sum, what must stay full."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dcx_kernels as dcx
from dcx_kernels.graph.layout import ABSENT, ALWAYS, ChannelTable, Ids, Layout


def equal(a: Ids, b: Ids) -> bool:
    return a.tolist() == b.tolist()


@pytest.fixture
def table() -> ChannelTable:
    """A table with three groups: a of 4 channels, b of 4, c of 2."""
    table = ChannelTable()
    for name, width in (("a", 4), ("b", 4), ("c", 2)):
        table.group(name, width)
    return table


def reasons(table: ChannelTable) -> dict[str, str]:
    return {name: reason for name, (_, _, reason) in table.found().items()}


class TestGroups:
    def test_numbers_are_given_once(self, table: ChannelTable) -> None:
        assert equal(table.group("a", 4), table.group("a", 4))
        assert table.group("a", 4).tolist() == [2, 3, 4, 5]  # behind ALWAYS and ABSENT
        assert table.group("c", 2).tolist() == [10, 11]
        assert len(table) == 12

    def test_found_lists_groups_in_the_order_of_the_network(self, table: ChannelTable) -> None:
        assert list(table.found()) == ["a", "b", "c"]
        assert table.owners(np.array([ALWAYS, 11, 3, ABSENT, 4])) == ["a", "c"]

    def test_the_first_reason_stands(self, table: ChannelTable) -> None:
        a = table.group("a", 4)
        table.keep(a[:1], "first")
        table.keep(a, "second")
        assert reasons(table) == {"a": "first", "b": "", "c": ""}


class TestTie:
    def test_the_later_group_follows_the_earlier(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        assert table.tie(b, a)
        assert equal(table.resolve(b), a)
        assert list(table.found()) == ["a", "c"]
        assert table.tie(b, a) and table.tie(a, a)

    def test_positions_are_kept(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        assert table.tie(a[[2, 0, 3, 1]], b)
        assert equal(table.resolve(b), a[[2, 0, 3, 1]])
        assert equal(table.resolve(b)[[1, 3, 0, 2]], a)

    def test_ties_are_transitive(self, table: ChannelTable) -> None:
        a, b, c = table.group("a", 4), table.group("b", 4), table.group("c", 2)
        d = table.group("d", 2)
        assert table.tie(d, c) and table.tie(np.concatenate([c, d]), b)
        assert equal(table.resolve(b), np.r_[c, c])
        assert table.tie(b, a)
        assert equal(table.resolve(a), np.r_[c, c])
        assert list(table.found()) == ["c"]

    def test_a_concatenation_of_whole_groups_can_be_tied(self, table: ChannelTable) -> None:
        a, c, d = table.group("a", 4), table.group("c", 2), table.group("d", 2)
        assert table.tie(a, np.concatenate([d, c]))
        assert equal(table.resolve(d), a[:2]) and equal(table.resolve(c), a[2:])

    def test_a_part_of_a_group_cannot_follow(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        before = table.state
        assert not table.tie(np.r_[a[:2], b[:2]], np.r_[b[2:], a[2:]])
        assert not table.tie(a, b[:2])
        assert not table.tie(a, np.full(4, ALWAYS))
        assert not table.tie(np.array([ABSENT, ABSENT]), table.group("c", 2))
        assert table.state == before

    def test_a_part_takes_a_whole_group_along(self, table: ChannelTable) -> None:
        a, c = table.group("a", 4), table.group("c", 2)
        assert table.tie(c, a[1:3])
        assert equal(table.resolve(c), a[1:3])

    def test_what_follows_hands_on_its_reason_and_its_runs(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        table.keep(b, "because")
        table.equal_runs(b, 2, "grouped")
        assert table.tie(a, b)
        assert table.found()["a"][1:] == (2, "because")


class TestUnion:
    def test_equal_parts_are_no_sum(self, table: ChannelTable) -> None:
        a = table.group("a", 4)
        assert equal(table.union([a, a]), a) and not table.unions

    def test_the_same_sum_has_the_same_channels(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        u = table.union([a, b])
        assert equal(table.union([a, b]), u) and len(table.unions) == 1
        assert set(u) & {*a, *b} == set()
        assert table.owners(u) == ["a", "b"]

    def test_a_sum_of_sums_reaches_all_groups(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        d = table.group("d", 4)
        u = table.union([table.union([a, b]), d])
        table.keep(u[:1], "one channel of it")
        assert reasons(table) == dict.fromkeys("abd", "one channel of it") | {"c": ""}

    def test_a_group_never_follows_a_sum_it_is_part_of(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        u = table.union([a, b])
        assert not table.tie(u, a) and not table.tie(b, table.union([u, b]))
        d = table.group("d", 4)
        assert table.tie(d, u) and equal(table.resolve(d), u)

    def test_parts_that_became_one_are_known_again(self, table: ChannelTable) -> None:
        a, b = table.group("a", 4), table.group("b", 4)
        u = table.union([a, b])
        table.tie(a, b)
        assert equal(table.union([a, b]), a) and not equal(u, a)


class TestEqualRuns:
    def test_runs_multiply_out(self, table: ChannelTable) -> None:
        d = table.group("d", 12)
        table.equal_runs(d, 2, "grouped")
        table.equal_runs(d, 3, "grouped")
        assert table.found()["d"][1:] == (6, "")

    def test_what_is_not_a_whole_group_is_kept(self, table: ChannelTable) -> None:
        a, b, c = table.group("a", 4), table.group("b", 4), table.group("c", 2)
        table.equal_runs(a[:2], 2, "part")
        table.equal_runs(np.r_[c, b], 2, "several")
        assert reasons(table) == {"a": "part", "b": "several", "c": "several"}

    def test_runs_that_do_not_divide_are_kept(self, table: ChannelTable) -> None:
        table.equal_runs(table.group("d", 6), 4, "four of six")
        assert table.found()["d"][2] == "four of six"

    def test_always_present_channels_have_no_runs(self, table: ChannelTable) -> None:
        before = table.state
        table.equal_runs(np.full(4, ALWAYS), 2, "image")
        assert table.state == before


def test_a_layout_is_itself_after_a_deep_copy() -> None:
    layout = Layout(np.arange(3))
    assert copy.deepcopy(layout) is layout and len(layout) == 3


def test_members_tell_where_channels_stand() -> None:
    """A concatenation, a chunk in another order and features of several pixels."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
            self.norm = nn.BatchNorm2d(6)
            self.swap = nn.Conv2d(6, 2, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, last = self.norm(torch.cat([self.a(x), self.b(x)], 1)).chunk(2, 1)
            return self.head(self.swap(torch.cat([last, first], 1)).flatten(1))

    groups = dcx.convert(Places(), torch.zeros(1, 3, 2, 2)).groups
    assert list(groups) == ["a", "b", "swap", "head"]
    assert [tuple(m) for m in groups["a"].members] == [
        ("a", "producer", 1, range(4)),
        ("norm", "norm", 1, range(4)),
        ("swap", "consumer", 1, (3, 4, 5, 0)),
    ]
    assert [tuple(m) for m in groups["b"].members] == [
        ("b", "producer", 1, range(2)),
        ("norm", "norm", 1, range(4, 6)),
        ("swap", "consumer", 1, range(1, 3)),
    ]
    assert groups["swap"].members[1] == ("head", "consumer", 4, range(2))
    assert groups["head"].reason == "output of the network"

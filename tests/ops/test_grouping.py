"""active_groups: which groups exist, and which sets cannot be computed."""

from __future__ import annotations

import pytest

from channel_helpers import Wanted, channels
from dcx_kernels.ops.grouping import active_groups

IN, OUT, GROUPS = 8, 12, 4  # runs of 2 inputs and 3 outputs


@pytest.mark.parametrize(
    ("in_", "out", "existing"),
    [
        (None, None, 4),
        (range(8), range(12), 4),
        ([0, 2, 4, 6], None, 4),
        (None, [1, 4, 6, 11], 4),
        ([0, 1, 4, 5], [0, 6], 2),
        ([3], [3, 4, 5], 1),
        (range(8), [0, 3, 6, 9], 4),
    ],
)
def test_active_groups_counts(in_: Wanted, out: Wanted, existing: int) -> None:
    assert active_groups(GROUPS, channels(in_, IN), channels(out, OUT)) == existing


def test_active_groups_ignores_sets_without_groups() -> None:
    assert active_groups(1, channels([0], IN), channels([0, 7], OUT)) == 1


@pytest.mark.parametrize(
    ("in_", "out", "message"),
    [
        (
            [0, 1, 2, 4, 6],
            None,
            r"equal active in channels in each of 4 groups, got \[2, 1, 1, 1\]",
        ),
        (
            None,
            [0, 1, 3, 6, 9],
            r"equal active out channels in each of 4 groups, got \[2, 1, 1, 1\]",
        ),
        ([0, 2], None, r"on both sides or on none \(4 groups\), got in \(1, 1, 0, 0\), out all"),
        (None, [0], r"on both sides or on none \(4 groups\), got in all, out \(1, 0, 0, 0\)"),
        ([0], [3], r"got in \(1, 0, 0, 0\), out \(0, 1, 0, 0\)"),
    ],
)
def test_active_groups_refuses(in_: Wanted, out: Wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        active_groups(GROUPS, channels(in_, IN), channels(out, OUT))

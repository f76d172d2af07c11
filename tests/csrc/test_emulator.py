"""The emulator finds what it is there to find: kernels that break CUDA's rules."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


def test_threads_of_a_block_meet(emulated: ModuleType) -> None:
    x = torch.arange(600, dtype=torch.float32)
    y = torch.zeros(3)
    emulated.reverse_and_sum(x.data_ptr(), y.data_ptr(), 600, 1024)
    assert y.tolist() == [float(part.sum()) for part in x.split(256)]


def test_writing_behind_shared_memory_is_an_error(emulated: ModuleType) -> None:
    x, y = torch.zeros(600), torch.zeros(3)
    with pytest.raises(RuntimeError, match="wrote 0 bytes behind its 1020 bytes"):
        emulated.reverse_and_sum(x.data_ptr(), y.data_ptr(), 600, 1020)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("barrier", "3 of 64 threads wait at a barrier|after a thread has ended"),
        ("ended", "names a lane that has ended|will never meet"),
        ("mixed", "different collectives"),
        ("shared", "expected at most 232448 bytes"),
        ("threads", "expected 1 to 1024 threads, got 1025"),
        ("misaligned", "not aligned"),
    ],
)
def test_broken_kernels_raise(emulated: ModuleType, which: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated.broken(which)


def test_shared_memory_starts_as_nan(emulated: ModuleType) -> None:
    y = torch.zeros(32)
    emulated.uninitialised(y.data_ptr())
    assert y.isnan().all()


def test_a_missing_barrier_shows_in_one_of_the_orders(built: ModuleType) -> None:
    """As threads run one after the other, a race may go well: in one order, not in both."""
    wrong = []
    for last_first in (False, True):
        built.last_first(last_first)
        y = torch.zeros(64)
        built.without_barrier(y.data_ptr())
        wrong.append(bool(y.isnan().any()))
    built.last_first(False)
    assert any(wrong)


def test_shuffles_and_votes(emulated: ModuleType) -> None:
    y = torch.zeros(5, 32, dtype=torch.int32)
    emulated.collectives(y.data_ptr())
    lanes = list(range(32))
    assert y[0].tolist() == [min(lane + 3, 31) if lane + 3 < 32 else lane for lane in lanes]
    assert y[1].tolist() == [lane - 3 if lane % 8 >= 3 else lane for lane in lanes]
    assert y[2].tolist() == [lane ^ 5 for lane in lanes]
    assert y[3].tolist() == [lane // 16 * 16 + 2 for lane in lanes]
    assert y[4].tolist() == [sum(1 << lane for lane in lanes if lane % 3 == 0)] * 32

"""Slices of many tensors in one native call: the bits that the reference moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels import ChannelSet
from dcx_kernels.kernels.native import load
from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from move_cases import (
    DTYPES,
    check_gather,
    check_memory,
    check_mismatch,
    check_mixed,
    check_nothing,
    check_scatter,
    note_reference,
)
from tolerances import assert_exact

if (lacking := load("cpu")) is not None:
    pytest.skip(f"the native library of CPUs is {lacking}", allow_module_level=True)

from dcx_kernels.kernels.native.cpu import slices as kernels

ALL = pytest.mark.parametrize("dtype", DTYPES, ids=str)
VECTORS = "reference 3"  # those of the cases: the reference makes them, where there is no memory


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return who was called: the library, by the size of an element, or the reference."""
    made: list[object] = []
    note_reference(monkeypatch, made)
    native = torch.ops.dcx_native.move_slices

    def noted(*args: Any) -> None:
        made.append(args[1])
        native(*args)

    monkeypatch.setattr(torch.ops.dcx_native, "move_slices", noted)
    return made


def _large() -> list[tuple[Tensor, Slice | None]]:
    """Return what several threads share, with boundaries inside of slices of every kind."""
    some = {size: ChannelSet(torch.randperm(size)[: size // 2], size).indices for size in (90, 301)}
    return [
        (torch.randn(301, 90, 3, 3), Slice((301, 90, 3, 3), some[301], some[90])),
        (torch.randn(301, 301), Slice((301, 301), None, some[301])),
        (torch.randn(301, 90, 5), Slice((301, 90, 5), some[301])),
        (torch.randn(90, 301, 4), Slice((90, 301, 4), None, some[301])),
        (torch.randn(77777), None),
        (torch.randn(301), Slice((301,), some[301])),
    ]


@ALL
@pytest.mark.usefixtures("_threads")
def test_gather_is_exact_in_one_call(dtype: torch.dtype, calls: list[object]) -> None:
    check_gather(kernels, dtype, calls, [VECTORS, dtype.itemsize])


@ALL
@pytest.mark.usefixtures("_threads")
def test_scatter_is_exact_and_leaves_the_rest(dtype: torch.dtype, calls: list[object]) -> None:
    check_scatter(kernels, dtype, calls)


@pytest.mark.usefixtures("_threads")
def test_large_slices_are_shared_among_threads() -> None:
    dense, slices = map(list, zip(*_large(), strict=True))
    packed = kernels.gather_slices(dense, slices)
    moved = [-part for part in packed]
    others = [tensor.clone() for tensor in dense]
    for part, wanted in zip(packed, reference.gather_slices(dense, slices), strict=True):
        assert_exact(part, wanted)
    kernels.scatter_slices_(dense, moved, slices)
    reference.scatter_slices_(others, moved, slices)
    for full, other in zip(dense, others, strict=True):
        assert_exact(full, other)


def test_gather_writes_into_the_memory_it_is_given(calls: list[object]) -> None:
    check_memory(kernels, calls)


def test_dtypes_and_layouts_mix(calls: list[object]) -> None:
    check_mixed(kernels, calls, ["reference 5", 4, 2])


@pytest.mark.parametrize("wrong", ["shape", "dtype", "length"])
def test_what_does_not_match_is_not_moved_by_address(wrong: str, calls: list[object]) -> None:
    check_mismatch(kernels, wrong, calls)


def test_slices_without_an_entry(calls: list[object]) -> None:
    check_nothing(kernels, calls, ["reference 1"])


@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        (torch.zeros(12, dtype=torch.int64), 4, "expected a table of 2 axes, got 1"),
        (torch.zeros(1, 11, dtype=torch.int64), 4, "expected 12 columns, got 11"),
        (torch.zeros(1, 12), 4, "expected a contiguous table of int64"),
        (torch.zeros(12, 2, dtype=torch.int64).t(), 4, "expected a contiguous table of int64"),
        (torch.zeros(1, 12, dtype=torch.int64), 3, "expected elements of 1, 2, 4 or 8 bytes"),
    ],
)
def test_wrong_tables_are_refused(table: Tensor, size: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dcx_native.move_slices(table, size, False)

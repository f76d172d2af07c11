"""Slices of many tensors in one launch: the bits that the reference moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcx_kernels.kernels.triton import slices as kernels
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

ALL = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class _Launches:
    """Stand for the kernel and note the size of an element of each launch."""

    def __init__(self, calls: list[object]) -> None:
        self.kernel, self.calls = kernels._move_slices_kernel, calls
        self.sizes = {bits: size for size, bits in kernels._BITS.items()}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **flags: Any) -> None:
            self.calls.append(self.sizes[flags["DTYPE"]])
            self.kernel[grid](*args, **flags)

        return launch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return who was called: the kernel, by the size of an element, or the reference."""
    made: list[object] = []
    note_reference(monkeypatch, made)
    monkeypatch.setattr(kernels, "_move_slices_kernel", _Launches(made))
    return made


@ALL
def test_gather_is_exact_in_one_launch(
    dtype: torch.dtype, device: torch.device, calls: list[object]
) -> None:
    check_gather(kernels, dtype, calls, [dtype.itemsize], device)


@ALL
def test_scatter_is_exact_and_leaves_the_rest(
    dtype: torch.dtype, device: torch.device, calls: list[object]
) -> None:
    check_scatter(kernels, dtype, calls, device)


def test_gather_writes_into_the_memory_it_is_given(
    device: torch.device, calls: list[object]
) -> None:
    check_memory(kernels, calls, device)


def test_dtypes_and_layouts_mix(device: torch.device, calls: list[object]) -> None:
    check_mixed(kernels, calls, ["reference 2", 4, 2], device)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "length"])
def test_what_does_not_match_is_not_moved_by_address(
    wrong: str, device: torch.device, calls: list[object]
) -> None:
    check_mismatch(kernels, wrong, calls, device)


def test_slices_without_an_entry(device: torch.device, calls: list[object]) -> None:
    check_nothing(kernels, calls, [], device)

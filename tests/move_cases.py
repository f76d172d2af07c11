"""Cases and oracles of moves of slices: what every backend that reads tables shows.

A backend's test gives its functions, the device, and ``calls``: a list that fills with the size of
an element of each launch, and with "reference 3" for a call of the reference with three tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from slice_cases import CASES, make, masks, nothing
from tolerances import assert_exact

__all__ = [
    "DTYPES",
    "check_gather",
    "check_memory",
    "check_mismatch",
    "check_mixed",
    "check_nothing",
    "check_scatter",
    "note_reference",
]

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


def note_reference(monkeypatch: pytest.MonkeyPatch, calls: list[object]) -> None:
    """Append to ``calls`` what the reference gets."""

    def noted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(f"reference {len(args[0])}")
            return function(*args)

        return call

    for name in ("gather_slices", "scatter_slices_"):
        monkeypatch.setattr(reference, name, noted(getattr(reference, name)))


def poisoned(slices: list[Slice | None], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random tensors, NaN where nothing is active."""
    dense = []
    for case, mask in zip(CASES.values(), masks(slices), strict=True):
        values = (100 * torch.rand(case.shape)).to(dtype)
        if dtype.is_floating_point:
            values = torch.where(mask, values, torch.nan)
        dense.append(values.to(device))
    return dense


def check_gather(
    moves: Any,
    dtype: torch.dtype,
    calls: list[object],
    expected: list[object],
    device: torch.device = CPU,
) -> None:
    """The bits that masks take, packed, each in memory of its own."""
    slices = make(device)
    dense = poisoned(slices, dtype, device)
    wanted = reference.gather_slices(dense, slices)
    calls.clear()
    packed = moves.gather_slices(dense, slices)
    assert calls == expected
    for name, part, right, full, mask in zip(
        CASES, packed, wanted, dense, masks(slices), strict=True
    ):
        assert_exact(part, right, name)
        assert_exact(part.flatten(), full[mask.to(device)], name)
        assert part.is_contiguous() and not part.isnan().any()
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*packed, *dense)}
    assert len(storages) == 2 * len(packed)


def check_scatter(
    moves: Any, dtype: torch.dtype, calls: list[object], device: torch.device = CPU
) -> None:
    """The bits that masks take, one launch; the rest bitwise as it was; each write is noted."""
    slices = make(device)
    dense = poisoned(slices, dtype, device)
    before = [tensor.clone() for tensor in dense]
    packed = [part.flip(0) + 1 for part in reference.gather_slices(dense, slices)]
    versions = [tensor._version for tensor in dense]
    calls.clear()
    moves.scatter_slices_(dense, packed, slices)
    assert calls == [dense[0].element_size()]
    assert all(t._version > old for t, old in zip(dense, versions, strict=True))
    for name, full, part, old, cpu_mask in zip(
        CASES, dense, packed, before, masks(slices), strict=True
    ):
        mask = cpu_mask.to(device)
        assert_exact(full[mask], part.flatten(), name)
        assert_exact(full[~mask], old[~mask], name)


def check_memory(moves: Any, calls: list[object], device: torch.device = CPU) -> None:
    """Memory that is given is used, of vectors too, from its beginning and no further."""
    slices = make(device)
    dense = poisoned(slices, torch.float32, device)
    memory: list[Tensor | None] = [
        torch.full((tensor.numel() + 3,), torch.nan, device=device) for tensor in dense
    ]
    memory[1] = None
    packed = moves.gather_slices(dense, slices, memory)
    assert calls == [4]
    for name, part, flat, wanted in zip(
        CASES, packed, memory, reference.gather_slices(dense, slices), strict=True
    ):
        assert_exact(part, wanted, name)
        if flat is not None:
            assert part.data_ptr() == flat.data_ptr()
            assert flat[part.numel() :].isnan().all()
    with pytest.raises(RuntimeError, match="shape"):
        moves.gather_slices(dense[:1], slices[:1], [torch.empty(2, device=device)])


def check_mixed(
    moves: Any, calls: list[object], expected: list[object], device: torch.device = CPU
) -> None:
    """A launch for each size of an element; what is unknown goes to the reference in one call."""
    slices = make(device)
    dense = poisoned(slices, torch.float32, device)
    dense = [t if n % 2 else t.to(torch.bfloat16) for n, t in enumerate(dense)]
    both = list(CASES).index("both")
    dense[both] = dense[both].contiguous(memory_format=torch.channels_last)
    dense[-1] = dense[-1].to(torch.complex128)  # 16 bytes
    wanted = reference.gather_slices(dense, slices)
    calls.clear()
    packed = moves.gather_slices(dense, slices)
    assert calls == expected
    for name, part, right in zip(CASES, packed, wanted, strict=True):
        assert_exact(part.real, right.real, name)
    dense[both] = dense[both].contiguous()  # the reference needs that, to write
    marked = [part + 1 for part in wanted]
    twins = [tensor.clone() for tensor in dense]
    versions = [tensor._version for tensor in dense]
    moves.scatter_slices_(dense, marked, slices)
    reference.scatter_slices_(twins, marked, slices)
    for name, full, twin, old in zip(CASES, dense, twins, versions, strict=True):
        assert_exact(full.real, twin.real, name)
        assert full._version > old, name


def check_mismatch(moves: Any, wrong: str, calls: list[object], device: torch.device = CPU) -> None:
    """What does not match is not moved by address."""
    slice_ = Slice((6, 4), torch.tensor([5], device=device))
    dense = torch.zeros((5, 4) if wrong == "shape" else (6, 4), device=device)
    dtype = torch.float64 if wrong == "dtype" else torch.float32
    packed = torch.ones(1, 4, dtype=dtype, device=device)
    packed = packed[:, :3] if wrong == "length" else packed
    with pytest.raises((IndexError, RuntimeError)):
        moves.scatter_slices_([dense], [packed], [slice_])
    assert calls == ["reference 1"] and not dense.any()


def check_nothing(
    moves: Any, calls: list[object], expected: list[object], device: torch.device = CPU
) -> None:
    """Slices without an entry are launched for nobody."""
    slices = nothing(device)
    dense = [torch.full(slice_.shape, torch.nan, device=device) for slice_ in slices]
    packed = moves.gather_slices(dense, slices)
    assert [part.shape for part in packed] == [slice_.packed_shape for slice_ in slices]
    moves.scatter_slices_(dense, packed, slices)
    assert moves.gather_slices([], []) == []
    assert calls == expected
    one = Slice((4, 3), torch.tensor([2], device=device))
    weight = torch.randn(4, 3, device=device)
    assert_exact(moves.gather_slices([*dense, weight], [*slices, one])[3], weight[2:3])

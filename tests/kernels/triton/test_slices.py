"""Slices of many tensors in one launch: the bits that the reference moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from dcx_kernels.kernels.triton import slices as triton_slices
from dcx_kernels.kernels.triton.slices import gather_slices, scatter_slices_
from slice_cases import CASES, make, masks, nothing
from tolerances import assert_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]
ALL = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class _Launches:
    """Stand for a kernel and count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.count = triton_slices._move_slices_kernel, 0
        monkeypatch.setattr(triton_slices, "_move_slices_kernel", self)

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.count += 1
        return self.kernel[grid]


def _poisoned(slices: list[Slice | None], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random tensors, NaN where nothing is active."""
    dense = []
    for case, mask in zip(CASES.values(), masks(slices), strict=True):
        values = (100 * torch.rand(case.shape)).to(dtype)
        if dtype.is_floating_point:
            values = torch.where(mask, values, torch.nan)
        dense.append(values.to(device))
    return dense


@ALL
def test_gather_is_exact_in_one_launch(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = make(device)
    dense = _poisoned(slices, dtype, device)
    launches = _Launches(monkeypatch)
    packed = gather_slices(dense, slices)
    assert launches.count == 1
    for name, part, wanted in zip(
        CASES, packed, reference.gather_slices(dense, slices), strict=True
    ):
        assert_exact(part, wanted, name)
        assert part.is_contiguous() and not part.isnan().any()
    assert len({part.untyped_storage().data_ptr() for part in packed}) == len(packed)


@ALL
def test_scatter_is_exact_and_leaves_the_rest(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = make(device)
    dense = _poisoned(slices, dtype, device)
    before = [tensor.clone() for tensor in dense]
    packed = [part.flip(0) + 1 for part in reference.gather_slices(dense, slices)]
    wanted = [tensor.clone() for tensor in dense]
    reference.scatter_slices_(wanted, packed, slices)
    versions = [tensor._version for tensor in dense]
    launches = _Launches(monkeypatch)
    scatter_slices_(dense, packed, slices)
    assert launches.count == 1
    assert all(t._version > old for t, old in zip(dense, versions, strict=True))
    for name, full, other, old, mask in zip(
        CASES, dense, wanted, before, masks(slices), strict=True
    ):
        assert_exact(full, other, name)
        assert_exact(full[~mask.to(device)], old[~mask.to(device)], name)


def test_gather_writes_into_the_memory_it_is_given(device: torch.device) -> None:
    slices = make(device)
    dense = _poisoned(slices, torch.float32, device)
    memory = [torch.full((tensor.numel() + 3,), torch.nan, device=device) for tensor in dense]
    memory[1] = None
    packed = gather_slices(dense, slices, memory)
    for name, part, flat, wanted in zip(
        CASES, packed, memory, reference.gather_slices(dense, slices), strict=True
    ):
        assert_exact(part, wanted, name)
        if flat is not None:
            assert part.data_ptr() == flat.data_ptr()
            assert flat[part.numel() :].isnan().all()


def test_dtypes_and_layouts_mix(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch for each size of an element; what does not lie flat goes another way."""
    slices = make(device)
    dense = _poisoned(slices, torch.float32, device)
    dense = [t if n % 2 else t.to(torch.bfloat16) for n, t in enumerate(dense)]
    last = list(CASES).index("both")
    dense[last] = dense[last].contiguous(memory_format=torch.channels_last)
    launches = _Launches(monkeypatch)
    packed = gather_slices(dense, slices)
    assert launches.count == 2
    for name, part, wanted in zip(
        CASES, packed, reference.gather_slices(dense, slices), strict=True
    ):
        assert_exact(part, wanted, name)


def test_slices_without_an_entry(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = nothing(device)
    dense = [torch.full(slice_.shape, torch.nan, device=device) for slice_ in slices]
    launches = _Launches(monkeypatch)
    packed = gather_slices(dense, slices)
    assert launches.count == 0
    assert [part.shape for part in packed] == [slice_.packed_shape for slice_ in slices]
    scatter_slices_(dense, packed, slices)
    assert gather_slices([], []) == []
    one = Slice((4, 3), torch.tensor([2], device=device))
    weight = torch.randn(4, 3, device=device)
    assert_exact(gather_slices([*dense, weight], [*slices, one])[3], weight[2:3])

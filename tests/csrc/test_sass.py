"""What nvcc makes of the kernels: nothing spilled, and 16 bytes an access where memory decides."""

from __future__ import annotations

import re

import pytest

from tests.csrc.conftest import ROOT
from tests.csrc.cuda_library import CudaLibrary


@pytest.mark.parametrize("source", sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")))
def test_nothing_is_spilled(cuda_library: CudaLibrary, arch: str, source: str) -> None:
    kernels = cuda_library.kernels(source, arch)
    assert kernels
    for kernel in kernels:
        assert kernel.local == 0, kernel.name
        assert not re.search(r"\b(LDL|STL)\b", kernel.code), kernel.name


@pytest.mark.parametrize(("source", "kernels"), [("slices", 10), ("slice_optimizer", 6)])
def test_memory_bound_kernels_move_16_bytes(
    cuda_library: CudaLibrary, arch: str, source: str, kernels: int
) -> None:
    found = cuda_library.kernels(source, arch)
    assert len(found) == kernels
    for kernel in found:  # addresses out of a table are generic: LD, not LDG
        assert kernel.registers <= 80
        assert re.search(r"\bLDG?\.E\.128", kernel.code), "no load of 16 bytes"
        assert re.search(r"\bSTG?\.E\.128", kernel.code), "no store of 16 bytes"


@pytest.mark.parametrize(("source", "kernels"), [("selection", 6), ("gate", 4)])
def test_what_selects_counts_in_shared_memory(
    cuda_library: CudaLibrary, arch: str, source: str, kernels: int
) -> None:
    found = cuda_library.kernels(source, arch)
    assert len(found) == kernels
    for kernel in found:
        assert kernel.registers <= 64, "a block of 1024 threads does not fit"
        assert not re.search(r"\b(ATOM|ATOMG|RED)\b", kernel.code), "depends on the order of blocks"
        assert re.search(r"\bATOMS\b", kernel.code) or "list" in kernel.name


@pytest.mark.parametrize(
    ("source", "reading", "kernels"),
    [("batch_norm_moments", 6, 7), ("batch_norm_gradients", 6, 8), ("batch_norm_apply", 6, 6)],
)
def test_batch_norm_moves_16_bytes(
    cuda_library: CudaLibrary, arch: str, source: str, reading: int, kernels: int
) -> None:
    found = cuda_library.kernels(source, arch)
    assert len(found) == kernels
    loading = [kernel for kernel in found if re.search(r"\bLDG\.E\.128", kernel.code)]
    assert len(loading) == reading, "no load of 16 bytes"
    for kernel in found:
        assert kernel.registers <= 80, "three blocks do not fit a multiprocessor"
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b", kernel.code), "order of threads"
        stores = re.search(r"\bSTG\.E\.128", kernel.code)
        assert (stores is not None) == (source == "batch_norm_apply"), kernel.name

"""Machine code of the convolutions: tensor cores, asynchronous copies of 16 bytes, no atomics."""

from __future__ import annotations

import re

import pytest

from tests.csrc.cuda_library import CudaLibrary

_MULTIPLY = {
    "bf16": "HMMA.16816.F32.BF16",
    "fp16": "HMMA.16816.F32 ",
    "tf32": "HMMA.1688.F32.TF32",
}


@pytest.mark.parametrize("dtype", _MULTIPLY)
@pytest.mark.parametrize(("pass_", "kernels"), [("channel_conv2d", 6), ("channel_conv2d_wgrad", 4)])
def test_machine_code(
    cuda_library: CudaLibrary, arch: str, pass_: str, kernels: int, dtype: str
) -> None:
    found = cuda_library.kernels(f"{pass_}_{dtype}", arch)
    assert len(found) == kernels
    for kernel in found:
        vector = re.search(r"Lb1E", kernel.name) is not None
        assert kernel.code.count(_MULTIPLY[dtype]) >= 16, kernel.name
        assert ("LDGSTS.E.BYPASS.128" in kernel.code) == vector, kernel.name
        assert not re.search(r"\b(ATOM|ATOMG|RED)\b", kernel.code), kernel.name

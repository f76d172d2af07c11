"""The CUDA library compiles, links and loads; it runs nowhere here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.csrc.conftest import ROOT
from tests.csrc.cuda_library import CudaLibrary

_LOAD = """
import json, sys
import torch
from dcx_kernels.kernels import native

lacking = native.load("cuda")
if lacking is None:
    from dcx_kernels.kernels.native import cuda
print(json.dumps([lacking, {
    name: torch._C._dispatch_has_kernel_for_dispatch_key(f"dcx_native::{name}", "CUDA")
    for name in sys.argv[1:]
}]))
"""
_CALL = """
import sys
import torch
from dcx_kernels.kernels import native

assert native.load("cuda") is None
on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, w, table = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), torch.zeros(1, 12, dtype=torch.int64)
ones = [1, 1], [0, 0], [1, 1]
op = torch.ops.dcx_native
for name, arguments in {
    "move_slice_blocks": (table, 1, 4, False),
    "sgd_slice_blocks": (table, 1, torch.float32, False, 0.1, 0.0, 0.0, 0.0, False, False),
    "channel_conv2d_fwd": (x, x, w, None, None, None, *ones),
    "channel_conv2d_wgrad": (w, x, x, *ones),
    "sample_conv2d_dgrad": (x, x, w, None, None, *ones),
    "select_channels": (torch.ones(3), torch.zeros(2, dtype=torch.int64), 2, 1),
    "k_winners": (torch.ones(2, 3), 1),
}.items():
    try:
        getattr(op, name).default.redispatch(on_gpu, *arguments)
        print(name, "ran")
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


def _run(library: CudaLibrary, code: str, *arguments: str) -> str:
    """Run ``code`` in a process of its own, on the libraries that were built."""
    if torch.version.cuda is None:
        pytest.skip("needs a torch that is built for CUDA")
    environment = {**os.environ, "DCX_LIBRARY_DIR": str(library.folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_serves_what_python_calls(cuda_library: CudaLibrary) -> None:
    called = set()
    for module in (ROOT / "dcx_kernels/kernels/native/cuda").glob("*.py"):
        called |= set(re.findall(r"dcx_native\.(\w+)", module.read_text()))
    assert {"move_slice_blocks", "channel_conv2d_fwd"} <= called
    lacking, served = json.loads(_run(cuda_library, _LOAD, *sorted(called)))
    assert lacking is None
    assert served == dict.fromkeys(called, True)


def test_operators_refuse_tensors_that_are_not_on_a_gpu(cuda_library: CudaLibrary) -> None:
    lines = _run(cuda_library, _CALL).splitlines()
    assert len(lines) == 7
    for line in lines:
        assert re.search(r": expected .*on (a|one|the) GPU", line), line

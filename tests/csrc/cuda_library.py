"""The CUDA library as nvcc makes it, and a look into its machine code."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ARCHS = {"sm_80": "8.0", "sm_90a": "9.0a"}  # what tests compile for


class Kernel(NamedTuple):
    """One kernel for one GPU.

    Attributes:
        name: mangled.
        code: its instructions.
        registers: of a thread.
        local: bytes of a thread in local memory, where spilled registers go.
    """

    name: str
    code: str
    registers: int
    local: int


class CudaLibrary(NamedTuple):
    """A folder with both native libraries, and the object files of the CUDA one."""

    folder: Path
    objects: Path
    toolkit: Path

    @functools.cache  # noqa: B019 - seconds to disassemble, and there is one library
    def kernels(self, source: str, arch: str) -> list[Kernel]:
        """Return the kernels of csrc/cuda/``source``.cu for ``arch``, as "sm_80"."""
        made = self.objects / f"{source}.cuda.cu.o"
        codes = {}
        for part in self._cuobjdump(made, "-sass", arch).split("Function : ")[1:]:
            name, _, code = part.partition("\n")
            codes[name.strip()] = code
        found = []
        usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)"
        for name, *numbers in re.findall(usage, self._cuobjdump(made, "-res-usage", arch)):
            registers, stack, local = map(int, numbers)
            found.append(Kernel(name, codes.pop(name), registers, stack + local))
        assert not codes
        return found

    def _cuobjdump(self, made: Path, what: str, arch: str) -> str:
        program = _find_cuobjdump(self.toolkit)
        folder = Path(program).parent  # nvdisasm, which it calls, is beside it
        path = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        command = [program, what, "-arch", arch, str(made)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout


def _find_cuobjdump(toolkit: Path) -> str:
    """Return the toolkit's program, or the one inside the Triton wheel."""
    places, triton = [toolkit / "bin"], importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for place in places:
        found = shutil.which("cuobjdump", path=str(place))
        if found is not None:
            return found
    pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")

"""Compile kernels for GPUs that are not there, from the real launchers, and read the machine code.

A driver without a GPU stands in for Triton's. Launchers are called with tensors without memory
("meta"); Triton's hook hands over what it would compile, and skips it. What was recorded is then
compiled by a few processes, and the programs taken apart with the tools in Triton's own wheel.

Runs as a program, since a process in which kernels are interpreted cannot compile them:

    python tests/kernels/triton/offline.py --arch 90 [--full] [--only fwd] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

# how Triton works is decided at its import
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402

__all__ = ["Case", "Recorded", "count_variants", "inspect_program", "pretend", "run_offline"]

Case = tuple[str, Callable[[], object]]
"""What it is called, and a call of launchers."""

SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB of shared memory that one block may use, by compute capability."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")
_WIDE_LOADS = re.compile(
    r"\b(?:LDG(?:\.\w+)*\.128|LDGSTS(?:\.\w+)*\.128|UTMALDG\S*|LDG(?:\.\w+)*\.256)"
)


class Recorded(NamedTuple):
    """One kernel as its launcher asked for it.

    Attributes:
        label: the case that asked first.
        kernel: module and name.
        key: Triton's cache key: one for each variant.
        flags: its constexpr arguments, warps and stages.
        specialization: what it takes to compile it elsewhere.
    """

    label: str
    kernel: tuple[str, str]
    key: str
    flags: dict[str, Any]
    specialization: str


class _Driver(DriverBase):
    """A GPU that is not there: nothing is loaded, nothing runs."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        properties = {"max_shared_mem": 1 << 30, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, None, 0, 0, 1024),
            get_device_properties=lambda _: properties,
        )
        self.launcher_cls = lambda src, metadata: lambda *args: None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> int:
        return self._arch  # what Triton remembers of a device, it remembers by its number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def pretend(arch: int) -> None:
    """Make Triton believe in a GPU of this compute capability (90 for sm_90)."""
    triton.runtime.driver.set_active(_Driver(arch))


@contextlib.contextmanager
def record(into: dict[str, Recorded], label: str) -> Iterator[None]:
    """Within this context launches compile and run nothing; what they ask for is put down.

    Args:
        into: gets every variant once, by its key and the kernel's name.
        label: the case.
    """

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        name = f"{fn.module}:{fn.jit_function.__name__}"
        if f"{name}:{key}" not in into:
            names = fn.jit_function.arg_names
            flags = {
                names[path[0]]: value
                for path, value in compile["constants"].items()
                if value is not None
            }
            flags |= {"num_warps": compile["num_warps"], "num_stages": compile["num_stages"]}
            into[f"{name}:{key}"] = Recorded(
                label,
                (fn.module, fn.jit_function.__name__),
                key,
                {name: value for name, value in flags.items() if _is_plain(value)},
                compile["specialization_data"],
            )
        return True

    before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def run_offline(cases: Iterable[tuple[int, Case]], jobs: int = 2) -> list[dict[str, Any]]:
    """Compile what cases launch, for the chip that is named with each.

    Returns:
        What `inspect_program` found, and more, one for each variant and chip.
    """
    recorded: dict[int, dict[str, Recorded]] = {}
    for arch, (label, call) in cases:
        pretend(arch)
        with record(recorded.setdefault(arch, {}), label):
            call()
    work = [(arch, one) for arch, found in recorded.items() for one in found.values()]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return list(pool.map(_compile, work))


def count_variants(cases: Iterable[Case], arch: int = 90) -> dict[str, list[dict[str, Any]]]:
    """Launch without compiling; return the flags of the variants that each kernel would have."""
    pretend(arch)
    recorded: dict[str, Recorded] = {}
    for label, call in cases:
        with record(recorded, label):
            call()
    found: dict[str, list[dict[str, Any]]] = {}
    for one in recorded.values():
        found.setdefault(one.kernel[1], []).append(one.flags)
    return found


_INSTRUCTION = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"


def inspect_program(cubin: bytes) -> dict[str, Any]:
    """Return registers, bytes of local memory, and which instructions a program consists of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _tool("cuobjdump", "-sass", "-res-usage", path)
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    lines = re.findall(_INSTRUCTION, text, re.M)
    opcodes = [opcode for _, opcode, _ in lines]
    kinds = {opcode.split(".")[0] for opcode in opcodes}
    return {
        "registers": numbers["REG"],
        "local": numbers["STACK"] + numbers["LOCAL"],
        "spills": sum(_is_spill(opcode) for opcode in opcodes),
        "spills_in_loop": _spills_in_main_loops(lines),
        "tensor_cores": sorted(kinds & set(_TENSOR_CORES)),
        "wide_loads": sum(bool(_WIDE_LOADS.match(opcode)) for opcode in opcodes),
        "instructions": len(opcodes),
    }


def _spills_in_main_loops(lines: Sequence[tuple[str, str, str]]) -> int:
    """Count what goes through local memory between a branch back and its target, with products."""
    at = [int(address, 16) for address, _, _ in lines]
    found: set[int] = set()
    for address, (_, opcode, operands) in zip(at, lines, strict=True):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = [n for n, where in enumerate(at) if int(target[1], 16) <= where <= address]
        if any(lines[n][1].split(".")[0] in _TENSOR_CORES for n in body):
            found |= {n for n in body if _is_spill(lines[n][1])}
    return len(found)


def _is_spill(opcode: str) -> bool:
    return opcode.split(".")[0] in ("LDL", "STL")


def _compile(job: tuple[int, Recorded]) -> dict[str, Any]:
    arch, recorded = job
    pretend(arch)
    function = getattr(importlib.import_module(recorded.kernel[0]), recorded.kernel[1])
    found = {
        "label": recorded.label,
        "kernel": recorded.kernel[1],
        "flags": recorded.flags,
        "arch": arch,
    }
    try:
        program = function.preload(recorded.specialization)
    except Exception as error:  # ptxas and MLIR fail in many ways; the table shows which
        return found | {"error": f"{type(error).__name__}: {error}"[:2000]}
    found["shared"] = program.metadata.shared
    found["shared_limit"] = SHARED_LIMITS[arch] * 1024
    return found | _inspected(program.asm["cubin"])


def _inspected(cubin: bytes) -> dict[str, Any]:
    """Inspect a program, or remember what was found in Triton's cache directory."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder is None:
        return inspect_program(cubin)
    path = Path(folder) / f"{hashlib.sha256(cubin).hexdigest()}.inspected.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    found = inspect_program(cubin)
    path.write_text(json.dumps(found))
    return found


def _tool(name: str, *args: object) -> str:
    command = [str(_TOOLS / name), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _title(one: dict[str, Any]) -> str:
    return f"sm_{one['arch']} {one['label']} ({one['kernel'].strip('_').removesuffix('_kernel')})"


def _row(one: dict[str, Any]) -> str:
    if "error" in one:
        return f"{_title(one):<76} {one['error'].splitlines()[0]}"
    cores = "+".join(one["tensor_cores"]) or "-"
    return (
        f"{_title(one):<76} {one['registers']:>5} {one['local']:>6} {one['spills']:>6}"
        f" {one['shared'] / 1024:>7.1f} {one['wide_loads']:>5} {one['instructions']:>6}  {cores}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED_LIMITS))
    parser.add_argument("--some", type=int, nargs="+", default=[], help="chips with fewer tiles")
    parser.add_argument("--full", action="store_true", help="all flags, not those of every day")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variants", type=int, help="count those at so many random widths instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    from offline_cases import OPERATORS, cases, layer_cases, some

    found: Any
    if args.variants:
        wanted = [op for op in OPERATORS if args.only in op]
        found = {op: count_variants(layer_cases(op, args.variants)) for op in wanted}
        lines = [
            f"{op:<16}" + ", ".join(f"{k}: {len(v)}" for k, v in sorted(kernels.items()))
            for op, kernels in found.items()
        ]
    else:
        offered = [(arch, one) for arch in args.arch for one in cases(args.dtype, args.full)]
        offered += [(arch, one) for arch in args.some for one in some(args.dtype)]
        found = run_offline([case for case in offered if args.only in case[1][0]], args.jobs)
        head = f"{'':<76} {'regs':>5} {'local':>6} {'spills':>6} {'KB':>7}"
        lines = [f"{head} {'wide':>5} {'instrs':>6}  tensor cores", *map(_row, found)]
    sys.stdout.write("\n".join(lines) + "\n")
    if args.json is not None:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

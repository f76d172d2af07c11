"""Machine code without a GPU: tensor cores, registers, spills, shared memory.

Kernels are compiled in a process of its own (see `offline`), once a session for each architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # on a busy machine; two idle processors take a tenth

OFFLINE = Path(__file__).with_name("offline.py")
CONVOLUTIONS = {"channel_conv2d_kernel", "_conv_wgrad_kernel"}
ARCHS = [90, 80, 100]
SLOW = [*((arch, "bfloat16") for arch in (80, 90, 100, 120)), (90, "float32")]

Found = list[dict[str, Any]]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for compiled kernels; ``TRITON_CACHE_DIR`` keeps them for longer."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or tmp_path_factory.mktemp("triton"))


def compiled(cache: Path, *arguments: object) -> Found:
    """Return what `offline` found, run with these arguments."""
    path = cache / "found.json"
    path.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(OFFLINE), *map(str, arguments), "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(path.read_text())
    assert len(found) > 10
    return found


@pytest.fixture(scope="session")
def every_day(cache: Path) -> dict[int, Found]:
    """Return what was found of what is compiled by default: everything on sm_90, a part else."""
    found = compiled(cache, "--arch", 90, "--some", 80, 100)
    return {arch: [one for one in found if one["arch"] == arch] for arch in ARCHS}


def check(found: Found, everywhere: bool) -> None:
    """Assert what holds for every kernel on every chip; names all that break it.

    Nothing goes through local memory: ``everywhere``, or at least in the loops with the products.
    """
    errors = [f"{_title(one)}: {one['error']}" for one in found if "error" in one]
    assert not errors, "\n".join(errors)
    for one in found:
        assert 0 < one["registers"] <= 255, _title(one)
    broken = [
        f"{_title(one)}: {one['local']} bytes of local memory, {one['spills']} spills"
        for one in found
        if one["spills_in_loop"] or (everywhere and (one["local"] or one["spills"]))
    ]
    broken += [
        f"{_title(one)}: {one['shared']} bytes of shared memory, {one['shared_limit']} exist"
        for one in found
        if one["shared"] > one["shared_limit"]
    ]
    assert not broken, "\n".join(broken)


def check_tensor_cores(arch: int, found: Found) -> None:
    """Assert that every convolution of 16-bit numbers multiplies on the best unit there is."""
    wrong = [
        f"{_title(one)}: {one['tensor_cores']}"
        for one in _convolutions(found)
        if not set(one["tensor_cores"]) & _expected(arch, one["flags"])
    ]
    assert not wrong, "\n".join(wrong)


def check_wide_loads(found: Found) -> None:
    """Assert that aligned operands are loaded 16 bytes at a time."""
    aligned = [one for one in _convolutions(found) if " aligned" in one["label"]]
    assert aligned
    narrow = [_title(one) for one in aligned if not one["wide_loads"]]
    assert not narrow, "\n".join(narrow)


def _expected(arch: int, flags: dict[str, Any]) -> set[str]:
    rows = flags["BLOCK_M"] if "BLOCK_M" in flags else flags["BLOCK_K"]
    if arch == 90 and rows >= 64 and flags["num_warps"] >= 4:
        return {"HGMMA"}
    return {"HMMA"} if arch < 100 else {"HMMA", "UTCHMMA"}


def _convolutions(found: Found) -> Found:
    return [one for one in found if one["kernel"] in CONVOLUTIONS]


def _title(one: dict[str, Any]) -> str:
    return f"sm_{one['arch']} {one['label']} ({one['kernel']})"


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_everything_fits(arch: int, every_day: dict[int, Found]) -> None:
    check(every_day[arch], everywhere=arch == 90)


@pytest.mark.parametrize("arch", ARCHS)
def test_convolutions_run_on_tensor_cores(arch: int, every_day: dict[int, Found]) -> None:
    check_tensor_cores(arch, every_day[arch])


@pytest.mark.parametrize("arch", ARCHS)
def test_aligned_operands_are_loaded_16_bytes_at_a_time(
    arch: int, every_day: dict[int, Found]
) -> None:
    check_wide_loads(every_day[arch])


def test_the_default_part_holds_every_tile_in_both_forms(every_day: dict[int, Found]) -> None:
    labels = {one["label"] for one in every_day[90]}
    for name in ("fwd", "dgrad"):
        for form in ("packed", "full"):
            assert sum(label.startswith(name) and form in label for label in labels) >= 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("arch", "dtype"), SLOW)
def test_every_flag(arch: int, dtype: str, cache: Path) -> None:
    found = compiled(cache, "--arch", arch, "--full", "--dtype", dtype)
    check(found, everywhere=False)
    if dtype != "float32":
        check_tensor_cores(arch, found)
        check_wide_loads(found)

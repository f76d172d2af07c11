"""What is found to build with, and what only looks like it."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import discover
import pytest
import torch

NVCC = "#!/bin/sh\nexec nvcc\n"
HEADER = "#define TORCH_VERSION_MAJOR {}\n#define TORCH_VERSION_MINOR {}\n"


def _torch(folder: Path, major: int, minor: int) -> Path:
    header = folder / "torch/include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text(HEADER.format(major, minor))
    return folder / "torch"


def test_torch_is_the_one_that_python_imports() -> None:
    assert discover.torch_home() == Path(torch.__file__).parent


def test_torch_of_the_environment_is_found_from_an_isolated_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda kind, **_: str(tmp_path))
    assert discover.torch_home() is None
    home = _torch(tmp_path, 3, 0)
    assert discover.torch_home() == home


@pytest.mark.parametrize(
    ("version", "found"), [((2, 10), False), ((2, 11), True), ((1, 99), False)]
)
def test_an_old_torch_will_not_do(
    version: tuple[int, int], found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda kind, **_: str(tmp_path))
    _torch(tmp_path, *version)
    assert (discover.torch_home() is not None) is found


def test_compiler_of_cxx(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("g++-99")
    assert discover.compiler() is None
    monkeypatch.setenv("CXX", "g++-99")
    assert discover.compiler() == ["g++-99"]
    monkeypatch.setenv("CXX", "ccache g++-99")
    assert discover.compiler() is None
    assert "CXX=ccache g++-99 is not there" in str(discover.missing("cpu"))
    machine.add("ccache")
    assert discover.compiler() == ["ccache", "g++-99"]


def test_cuda_home_is_the_toolkits_root(
    machine: Any, toolkit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toolkit("cuda")
    (machine.bin / "nvcc").symlink_to(whole / "bin/nvcc")
    assert discover.cuda_home() == whole
    monkeypatch.setenv("CUDA_PATH", str(toolkit("other")))
    assert discover.cuda_home() == toolkit("other")
    monkeypatch.setenv("CUDA_HOME", str(whole))
    assert discover.cuda_home() == whole


@pytest.mark.parametrize(
    "without", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"]
)
def test_a_prefix_that_lacks_a_part_is_refused(
    without: str, machine: Any, toolkit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix of a wrapper script, above all, which has bin/nvcc; no other one is taken then."""
    whole = toolkit("cuda")
    (machine.bin / "nvcc").symlink_to(whole / "bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(toolkit("partial", without)))
    assert discover.cuda_home() is None
    monkeypatch.setattr(discover, "sources", lambda library: [Path("a.cu")])
    monkeypatch.setattr(discover, "compiler", lambda: ["g++"])
    reason = str(discover.missing("cuda"))
    assert "lib64/libcudart_static.a in it, got" in reason
    assert reason.endswith("partial")


def test_a_wrapper_script_on_the_path_is_no_toolkit(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("nvcc", NVCC)
    real = discover._is_toolkit
    monkeypatch.setattr(  # the machine that runs the test may have one there
        discover, "_is_toolkit", lambda home: home != Path("/usr/local/cuda") and real(home)
    )
    assert discover.cuda_home() is None


def test_toolkits_of_conda_keep_their_files_under_targets(
    machine: Any, toolkit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit("conda", "include/cuda_runtime.h", "lib64/libcudart_static.a")
    folder = home / "targets/x86_64-linux"
    for part in ("include/cuda_runtime.h", "lib/libcudart_static.a"):
        (folder / part).parent.mkdir(parents=True)
        (folder / part).touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert discover.cuda_home() == home
    assert discover.cuda_library_folder(home) == folder / "lib"


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        ("75 80 86 90", "8.0 9.0a 9.0+PTX"),  # CUDA 12.6
        ("80 90 100 120 121", "8.0 9.0a 10.0 12.0+PTX"),
    ],
)
def test_archs_are_those_that_the_toolkit_knows(
    known: str, archs: str, machine: Any, toolkit: Callable[..., Path]
) -> None:
    nvcc = toolkit("cuda", archs=known) / "bin/nvcc"
    assert discover.cuda_archs(nvcc) == archs.split()


def test_archs_of_the_environment(
    machine: Any, toolkit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = toolkit("cuda", archs="50") / "bin/nvcc"
    with pytest.raises(discover.BuildError, match=r"compiles for none of 8\.0"):
        discover.cuda_archs(nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " 8.6;9.0a 12.0+PTX")
    assert discover.cuda_archs(nvcc) == ["8.6", "9.0a", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(discover.BuildError, match=r"expected numbers .*, got 'Hopper'"):
        discover.cuda_archs(nvcc)

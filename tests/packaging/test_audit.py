"""The audit passes our library and finds fault with others."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import audit
import discover
import pytest
import torch

from dcx_kernels._env import library_dir

LIBRARIES = [library_dir() / f"_C_{name}.abi3.so" for name in ("cpu", "cuda")]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_our_libraries_need_the_stable_functions_only(library: Path) -> None:
    if not library.is_file():
        pytest.skip(f"{library.name} is not built")
    assert audit.check_library(library) == []
    needed = set(audit.externals(library))
    assert "libtorch_cpu.so" in needed
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2"}
    system |= {"librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed <= system | {"libtorch_cpu.so"}


def test_a_library_on_torchs_cpp_interface_is_refused() -> None:
    libraries = Path(torch.__file__).parent / "lib"
    wrong = audit.check_library(libraries / "libtorch_python.so")
    assert any("expected stable functions of torch only, got _ZN" in line for line in wrong)


def _compile(folder: Path, code: str, *flags: str) -> Path:
    compiler = discover.compiler()
    if compiler is None:
        pytest.skip("no compiler")
    source, library = folder / "a.cpp", folder / "a.so"
    source.write_text(f'extern "C" {{ {code} }}')
    command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(library), *flags]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("aoti_torch_get_dim", True),
        ("torch_parallel_for", True),
        ("PyList_New", False),
        ("cudaMalloc", False),
        ("not_torch_new", False),
    ],
)
def test_imports_by_name(name: str, fine: bool, tmp_path: Path) -> None:
    library = _compile(tmp_path, f"void {name}(); void f() {{ {name}(); }}")
    wrong = audit.check_library(library)
    got = f"a.so: expected stable functions of torch only, got {name}"
    assert wrong == ([] if fine else [got])


def test_functions_of_the_system_are_auditwheels_affair(tmp_path: Path) -> None:
    library = _compile(tmp_path, "void abort(); void f() { abort(); }")
    assert "abort" not in audit.unversioned(library)
    assert "libc.so.6" in audit.externals(library)


def test_a_glibc_that_is_too_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _compile(tmp_path, "void abort(); void f() { abort(); }")
    assert audit.too_new(library) is None
    (version,) = [version for name, version in audit.imports(library) if name == "abort"]
    wheel = _wheel(tmp_path / "a.whl", a__so=library.read_bytes())
    assert audit.check_wheel(wheel) == []
    monkeypatch.setattr(audit, "_GLIBC", (2, 1))
    (sentence,) = audit.check_wheel(wheel)
    assert "a.so: expected glibc 2.1 at most, got " in sentence
    assert f"abort@{version}" in sentence
    assert "Build the wheel in the manylinux_2_28 image" in sentence


def _wheel(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return path


def test_a_wheel_without_a_library_and_one_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "a.whl", module__py=b"x = 1\n" * 1000)
    assert audit.check_wheel(wheel) == ["a.whl: expected a native library in it"]
    monkeypatch.setattr(audit, "LARGEST", 2**10)
    assert audit.check_wheel(wheel)[0].startswith("a.whl: expected less than")
    with pytest.raises(SystemExit, match="expected a native library"):
        audit.main([str(wheel), str(tmp_path)])

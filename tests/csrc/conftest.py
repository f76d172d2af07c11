"""Builds csrc's launch arithmetic and its kernels, emulated on the CPU, once for every state."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from tests.csrc.cuda_library import ARCHS, CudaLibrary

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
_HERE = Path(__file__).resolve().parent
_NAME = "dcx_csrc_tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test here the time to compile: the first one that runs does."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def built() -> ModuleType:
    """Return the module of tests/csrc/bindings."""
    import discover

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    cuda = discover.cuda_home()
    if compiler is None or cuda is None:
        pytest.skip(f"needs a C++ compiler ({compiler}) and a CUDA toolkit, CUDA_HOME ({cuda})")
    if ninja is None:
        pytest.skip("needs ninja")
    pybind11 = pytest.importorskip("pybind11")
    flags = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", "-DDCX_EMULATED", f"-I{_HERE / 'emulated'}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}"]
    flags += [f"-isystem{sysconfig.get_path('include')}"]
    flags += [f"-isystem{headers}" for headers in discover.cuda_include_folders(cuda)]
    sources = sorted([*(ROOT / "csrc/cuda").glob("*.cu"), *(_HERE / "bindings").glob("*.cpp")])
    read = [*sources, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    read += _HERE.rglob("*.h")
    state = hashlib.sha256(repr([compiler, sys.version, flags]).encode())
    for path in sorted(read):
        state.update(str(path).encode() + path.read_bytes())
    folder = ROOT / "build/tests" / state.hexdigest()[:16]
    library = folder / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not library.exists():
            _ninja_file(folder, compiler, flags, sources, library.name)
            done = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True)
            if done.returncode:
                pytest.fail(done.stdout + done.stderr, pytrace=False)
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cuda_library() -> CudaLibrary:
    """Build both native libraries, the CUDA one by nvcc: about a minute, the first time."""
    import discover
    import toolchain

    folder, objects = ROOT / "build/tests/native", ROOT / "build/tests/native-cuda"
    toolkit, lacking = discover.cuda_home(), toolchain.missing("cuda")
    if lacking is not None or toolkit is None:
        pytest.skip(f"needs what compiles CUDA: {lacking}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", " ".join(ARCHS.values()))
        toolchain.build("cpu", folder / "_C_cpu.abi3.so", ROOT / "build/native/cpu")
        toolchain.build("cuda", folder / "_C_cuda.abi3.so", objects)
    return CudaLibrary(folder, objects, toolkit)


@pytest.fixture(scope="session", params=list(ARCHS))
def arch(request: pytest.FixtureRequest) -> str:
    """Return the GPU that is compiled for."""
    name: str = request.param
    return name


@pytest.fixture(params=["first thread first", "last thread first"])
def emulated(built: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Return the module; threads and blocks run in either order, which must not matter."""
    built.last_first(request.param == "last thread first")
    yield built
    built.last_first(False)


def _ninja_file(
    folder: Path, compiler: str, flags: list[str], sources: list[Path], library: str
) -> None:
    lines = [f"flags = {' '.join(flags)}", "rule compile"]
    lines += [f"  command = {compiler} $flags -x c++ -c $in -o $out", "rule link"]
    lines += [f"  command = {compiler} -shared $in -o $out.part && mv $out.part $out"]
    objects = [f"{source.stem}{source.suffix}.o" for source in sources]
    lines += [
        f"build {made}: compile {source}" for made, source in zip(objects, sources, strict=True)
    ]
    lines += [f"build {library}: link {' '.join(objects)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))

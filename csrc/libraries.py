"""Which native libraries are built: the modes of ``DCX_BUILD``, and the record of what was done.

    python csrc/libraries.py            # in place, as DCX_BUILD says
    python csrc/libraries.py --sanitize # the CPU library into build/sanitize, for `make sanitize`

The record, ``_build.json`` beside the libraries, is what `dcx info` reads out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import toolchain
from discover import BuildError, cuda_named, missing

__all__ = ["MODES", "RECORD", "build_all", "file_name", "mode", "wanted"]

MODES = {"auto": ("cpu", "cuda"), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}
RECORD = "_build.json"
CHECKOUT = Path(__file__).resolve().parent.parent
SCRATCH = CHECKOUT / "build/native"
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
)


def file_name(library: str) -> str:
    """Return the name of a library's file; it holds no Python, so that any version loads it."""
    return f"_C_{library}.abi3.so"


def mode() -> str:
    """Return ``DCX_BUILD``; exit with a sentence if it is not a mode."""
    named = os.environ.get("DCX_BUILD") or "auto"
    if named not in MODES:
        raise SystemExit(f"DCX_BUILD: expected one of {', '.join(MODES)}, got {named!r}")
    return named


def wanted(named: str) -> dict[str, str | None]:
    """Say of each library why a mode does not build it; None: it does.

    ``auto`` builds what it can, CUDA only where the environment names a toolkit: that takes
    minutes, and an nvcc on the PATH is not yet a wish.
    """
    return {library: _why_not(library, named) for library in ("cpu", "cuda")}


def _why_not(library: str, named: str) -> str | None:
    if library not in MODES[named]:
        return f"DCX_BUILD={named} left it out (DCX_BUILD={library} builds it)"
    if named != "auto":
        return None
    lacking = missing(library)
    if lacking is None and library == "cuda" and not cuda_named():
        return "CUDA_HOME is not set: set it to the toolkit's root, or build with DCX_BUILD=cuda"
    return lacking


def build_all(named: str, folder: Path, scratch: Path = SCRATCH, *, strict: bool = False) -> None:
    """Build the libraries of a mode into ``folder`` and write the record.

    A library that is not built is removed, so that no old one is loaded.

    Args:
        named: the mode.
        folder: where the libraries and the record go.
        scratch: folder of object files.
        strict: in mode "auto" too, what has all that it needs must compile: for a checkout, where
            the sources are being worked on.

    Raises:
        BuildError: if one that was asked for by name cannot be built; never in mode "auto" unless
            ``strict``.
    """
    for library in MODES[named] if named != "auto" else ():  # before minutes of compilation
        lacking = missing(library)
        if lacking is not None:
            raise BuildError(f"DCX_BUILD={named}: {file_name(library)}: {lacking}")
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, dict[str, str]] = {}
    for library, reason in wanted(named).items():
        target = folder / file_name(library)
        if reason is None:
            try:
                record[library] = toolchain.build(library, target, scratch / library)
            except BuildError as error:
                if named != "auto" or strict:
                    raise BuildError(f"DCX_BUILD={named}: {target.name}: {error}") from None
                print(f"{target.name}: {error}", file=sys.stderr)
                reason = _summary(str(error))
        if reason is not None:
            target.unlink(missing_ok=True)
            record[library] = {"not built": reason}
        print(f"{target.name}: {'not built: ' + reason if reason else 'built'}", flush=True)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _summary(message: str) -> str:
    """Return the line of a compiler's output that names the error."""
    lines = message.splitlines()
    telling = next((line for line in lines if "error" in line.lower()), lines[0])
    return f"it did not compile: {telling.strip()[:200]} (DCX_BUILD=cpu or cuda shows it all)"


def _sanitized() -> None:
    folder = CHECKOUT / "build/sanitize"
    toolchain.build("cpu", folder / file_name("cpu"), SCRATCH / "sanitize", SANITIZERS)


def main(arguments: list[str]) -> None:
    """Build in place, or with sanitizers."""
    if arguments not in ([], ["--sanitize"]):
        raise SystemExit("usage: libraries.py [--sanitize]")
    try:
        if arguments:
            _sanitized()
        else:
            build_all(mode(), CHECKOUT / "dcx_kernels", strict=True)
    except BuildError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])

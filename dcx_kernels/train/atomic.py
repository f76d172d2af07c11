"""Replace a file all at once: a reader, a crash or a full disk never meets half of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["replace_file", "replace_text", "temporary_name"]


def temporary_name(path: Path) -> Path:
    """Return the name ``path`` is written under first: same directory, so that renaming is atomic.

    The name is fixed: what a killed process left behind is overwritten by the next save.
    """
    return path.with_name(f".{path.name}.tmp")


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary file, force it to disk, then rename it over ``path``.

    Args:
        path: the file to create or replace; its directory is created.
        write: writes the whole content into the file it is given.

    Raises:
        Exception: whatever ``write`` or the file system raises. ``path`` is then as before, and
            the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write(temporary)
        _force_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _force_to_disk(path.parent)  # the renaming itself


def replace_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text`` (UTF-8), all at once."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_file(path, write)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""One process in a directory: two that wrote the same checkpoints and log would undo each other."""

from __future__ import annotations

from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from dcx_kernels.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows; there nobody is kept out
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "hold"]

_NAME = ".lock"


class Lock:
    """Keeps other processes out of a directory as long as it is referred to.

    The operating system lets go when the process ends, however it ends.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __del__(self) -> None:
        self._file.close()


_held: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def hold(directory: Path) -> Lock | None:
    """Keep other processes out of a directory; this one may hold it as often as it likes.

    Args:
        directory: is created if need be.

    Returns:
        To be kept while the directory is in use; None on a file system without locks.

    Raises:
        CheckpointError: if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = (directory / _NAME).resolve()
    held = _held.get(path)
    if fcntl is None or (held is not None and path.exists()):
        return held
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        what = "wait for it, or train in another directory"
        raise CheckpointError(f"another process is training in {directory}: {what}") from None
    except OSError:  # a file system without locks
        file.close()
        return None
    _held[path] = lock = Lock(file)
    return lock

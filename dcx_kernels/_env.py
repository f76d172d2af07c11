"""Every environment variable the package reads."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "ENV_VARS",
    "autotune_enabled",
    "backend_override",
    "check_enabled",
    "convolution_override",
    "fuse_override",
    "library_dir",
    "tiles_path",
]

ENV_VARS = {
    "DCX_AUTOTUNE": "1: time the tiles of a kernel on the GPU where no file holds a choice",
    "DCX_BACKEND": "force a kernel backend by name instead of the dispatch rule",
    "DCX_CHECK": "1: tag compact tensors with their channel set and verify it in every operator",
    "DCX_CONV": "own, library or padded: force what convolves on a GPU (backend triton)",
    "DCX_FUSE": "1 or 0: fuse convolutions with the norms around them on any backend, or on none",
    "DCX_LIBRARY_DIR": "folder of native libraries to load instead of the package's own",
    "DCX_TILES": "file of tiles to use and write instead of the one in the cache directory",
}


def autotune_enabled() -> bool:
    """Return whether ``DCX_AUTOTUNE=1`` asks for tiles to be timed at their first use."""
    return os.environ.get("DCX_AUTOTUNE", "0") == "1"


def backend_override() -> str | None:
    """Return the backend forced by ``DCX_BACKEND``, or None."""
    return os.environ.get("DCX_BACKEND") or None


def check_enabled() -> bool:
    """Return whether ``DCX_CHECK=1`` asks for the (slow) set checks."""
    return os.environ.get("DCX_CHECK", "0") == "1"


def convolution_override() -> str | None:
    """Return the implementation of convolutions forced by ``DCX_CONV``, or None."""
    return os.environ.get("DCX_CONV") or None


def library_dir() -> Path:
    """Return the folder of native libraries: ``DCX_LIBRARY_DIR``, else the package's own."""
    named = os.environ.get("DCX_LIBRARY_DIR")
    return Path(named) if named else Path(__file__).resolve().parent


def tiles_path() -> str | None:
    """Return the file of tiles named by ``DCX_TILES``, or None."""
    return os.environ.get("DCX_TILES") or None


def fuse_override() -> bool | None:
    """Return whether ``DCX_FUSE`` forces (1) or forbids (0) fused convolutions; None: neither."""
    return {"1": True, "0": False}.get(os.environ.get("DCX_FUSE", ""))

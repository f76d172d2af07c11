"""Every environment variable the package reads."""

from __future__ import annotations

import os

__all__ = ["ENV_VARS", "backend_override", "check_enabled"]

ENV_VARS = {
    "DCX_BACKEND": "force a kernel backend by name instead of the dispatch rule",
    "DCX_CHECK": "1: tag compact tensors with their channel set and verify it in every operator",
}


def backend_override() -> str | None:
    """Return the backend forced by ``DCX_BACKEND``, or None."""
    return os.environ.get("DCX_BACKEND") or None


def check_enabled() -> bool:
    """Return whether ``DCX_CHECK=1`` asks for the (slow) set checks."""
    return os.environ.get("DCX_CHECK", "0") == "1"

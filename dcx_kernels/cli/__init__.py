"""The command line ``dcx``."""

from __future__ import annotations

from dcx_kernels.cli.main import main

__all__ = ["main"]

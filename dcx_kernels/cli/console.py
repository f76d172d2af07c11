"""The console that every subcommand prints on."""

from __future__ import annotations

from rich.console import Console

__all__ = ["make_console"]

_WIDTH = 120


def make_console() -> Console:
    """Return a console as wide as the terminal; wide enough for the tables if there is none."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=_WIDTH)

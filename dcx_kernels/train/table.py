"""The comparison table: its columns and how their numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["COLUMNS", "cells", "count", "size"]

COLUMNS = (
    "network",
    "test accuracy",
    "parameters",
    "MACs",
    "median step",
    "saved for backward",
)


def cells(arm: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of one arm, in the order of `COLUMNS`; "-" where nothing was measured."""
    step_ms, saved = arm.get("step_ms"), arm.get("saved_bytes")
    return (
        str(arm["arm"]),
        f"{100 * arm['accuracy']:.2f} %",
        count(arm["params"]),
        count(arm["macs"]),
        "-" if step_ms is None else f"{step_ms:.1f} ms",
        "-" if saved is None else size(saved),
    )


def count(number: float) -> str:
    """Write a number with a unit of thousands: 20035018 is "20.04 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 1000 or unit == " G":
            return f"{number:.0f}" if unit == "" else f"{number:.2f}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


def size(number: float) -> str:
    """Write a number of bytes in KiB or, from 0.1 of them on, in MiB."""
    if number < 0.1 * 2**20:
        return f"{number / 2**10:.1f} KiB"
    return f"{number / 2**20:.1f} MiB"

"""Nothing in the backend waits for a GPU: its source calls nothing that brings data to the host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcx_kernels.kernels.triton as kernels

FOLDER = Path(kernels.__file__).parent
WAITS = {"item", "tolist", "nonzero", "cpu", "numpy", "synchronize", "unique", "masked_select"}
MEASURES = {"tune.py"}  # times tiles: on request only


def waiting(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of every call of a method that waits."""
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in WAITS:
            yield called.lineno, called.attr


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_no_launcher_waits(path: Path) -> None:
    found = list(waiting(path.read_text(encoding="utf-8")))
    assert path.name in MEASURES or not found


def test_a_wait_is_found() -> None:
    assert list(waiting("y = x.sum()\nn = y.item()")) == [(2, "item")]

"""README's python blocks run, in order, in one namespace, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> list[tuple[int, str]]:
    """Return line number and source of each python block."""
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in _BLOCK.finditer(text)]


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python\ny = x\nz = y\n```\n"
    assert _blocks(text) == [(2, "x = 1\n"), (9, "y = x\nz = y\n")]


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = _blocks(text)
    assert len(blocks) == text.count("```python"), "a python block of README is not closed"
    assert blocks, "README shows no code"
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, source in blocks:
        # padded with newlines, so that a traceback names README's own line
        exec(compile("\n" * line + source, str(README), "exec"), namespace)

"""A file is replaced as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcx_kernels.train.atomic import replace_file, replace_text, temporary_name


def test_replace_text_creates_directory_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    replace_text(path, "one")
    replace_text(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_replace_file_keeps_the_old_one_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "f"
    replace_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        replace_file(path, half)
    assert path.read_text() == "old"
    assert not temporary_name(path).exists()


def test_replace_file_forces_content_before_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        events.append("fsync " + Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    replace_text(path, "x")
    assert events == [f"fsync {temporary_name(path).name}", "rename", f"fsync {tmp_path.name}"]

"""What did not change is not compiled again; what did, is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import discover
import pytest
import toolchain


@pytest.fixture
def project(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a machine with sources of its own; all of them include ``machine.header``."""
    machine.add_compiler()
    monkeypatch.setattr(discover, "ROOT", machine.root)
    monkeypatch.setattr(toolchain, "ROOT", machine.root)
    (machine.root / "cpu").mkdir()
    for name in ("compat.cpp", "ops.cpp", "cpu/a.cpp", "cpu/b.cpp"):
        (machine.root / name).touch()
    return machine


def _build(machine: Any, *flags: str) -> list[str]:
    target = machine.root / "made.so"
    toolchain.build("cpu", target, machine.root / "scratch", flags)
    assert target.is_file()
    compiled: list[str] = machine.compiled()
    return compiled


def _touch(path: Path) -> None:
    later = time.time() + 5
    os.utime(path, (later, later))


def test_first_all_then_nothing(project: Any) -> None:
    assert _build(project) == ["a.cpp", "b.cpp", "compat.cpp", "ops.cpp"]
    assert _build(project) == []


def test_a_source_that_changed(project: Any) -> None:
    _build(project)
    _touch(project.root / "cpu/a.cpp")
    assert _build(project) == ["a.cpp"]


def test_a_new_source(project: Any) -> None:
    _build(project)
    (project.root / "cpu/c.cpp").touch()
    assert _build(project) == ["c.cpp"]


def test_a_header_that_changed_or_went(project: Any) -> None:
    _build(project)
    _touch(project.header)
    assert len(_build(project)) == 4
    project.header.unlink()
    assert len(_build(project)) == 4


def test_other_flags_and_another_compiler(project: Any) -> None:
    _build(project)
    assert len(_build(project, "-g")) == 4
    assert _build(project, "-g") == []
    script = project.bin / "g++"
    script.write_text(script.read_text().replace("1.2", "1.3"))
    assert len(_build(project, "-g")) == 4


def test_what_did_not_compile_is_tried_again(project: Any) -> None:
    project.refuse.touch()
    with pytest.raises(discover.BuildError, match="error: no"):
        _build(project)
    assert not (project.root / "made.so").exists()
    project.refuse.unlink()
    project.log.unlink()
    assert len(_build(project)) == 4


def test_max_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain._jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "0")
    assert toolchain._jobs() >= 1

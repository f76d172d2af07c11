"""``dcx info`` says what was built, and of what is missing why and what helps."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dcx_kernels.cli import main
from dcx_kernels.kernels import backend, native
from dcx_kernels.kernels.native import AGAIN, load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty folder that libraries are looked for in."""
    monkeypatch.setenv("DCX_LIBRARY_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    caches = (load, backend._native)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def _info(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Return the cells of every row by the row's first cell; wrapped lines are joined."""
    assert main(["info"]) == 0
    rows: dict[str, list[str]] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("\u2502")[1:-1]]
        if cells and cells[0]:
            name, rows[cells[0]] = cells[0], cells[1:]
        elif cells:
            pairs = zip(rows[name], cells[1:], strict=True)
            rows[name] = [" ".join(filter(None, pair)) for pair in pairs]
    return rows


def test_why_a_library_was_not_built(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"cpu": {"not built": "no C++ compiler"}, "cuda": {"not built": "no toolkit"}}
    (folder / "_build.json").write_text(json.dumps(record))
    rows = _info(capsys)
    assert rows["native (CPU)"][:2] == ["no", f"not built: no C++ compiler. {AGAIN}"]
    assert rows["native (CUDA)"][:2] == ["no", f"not built: no toolkit. {AGAIN}"]
    assert rows["_C_cpu"] == ["not built"]
    assert rows["reference"][-1] == "cpu"


def test_without_a_record(folder: Path) -> None:
    assert f"no library and no record of a build in {folder}. To" in str(load("cpu"))


def test_what_a_library_was_built_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"cpu": {"compiler": "g++ 1.2", "torch": "2.11"}}
    (folder / "_build.json").write_text(json.dumps(record))
    (folder / "_C_cpu.abi3.so").write_text("not a library")
    rows = _info(capsys)
    assert rows["_C_cpu"][0].startswith("compiler g++ 1.2, torch 2.11")
    assert rows["native (CPU)"][1].startswith("does not load: ")


def test_a_library_that_lacks_an_operator_is_not_used(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after new sources were fetched: the package has operators that the library lacks."""

    (folder / "cpu.py").write_text("OPERATORS = ('new_operator',)\n")
    monkeypatch.setattr(native, "load", {"cpu": None, "cuda": "not built"}.get)
    monkeypatch.setattr(native, "__path__", [str(folder)])
    monkeypatch.delattr(native, "cpu", raising=False)
    monkeypatch.delitem(sys.modules, "dcx_kernels.kernels.native.cpu", raising=False)
    why = _info(capsys)["native (CPU)"][1]
    assert why == f"built from other sources than this package, without new_operator. {AGAIN}"
    assert backend.choose(torch.device("cpu")).NAME == "reference"


def test_a_library_older_than_its_sources(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = folder / "csrc"
    (sources / "cpu").mkdir(parents=True)
    library = folder / "_C_cpu.abi3.so"
    for path in (sources / "cpu/a.cpp", library, sources / "README.md"):
        path.touch()
        os.utime(path, (1000, 1000))
    (sources / "exports.map").touch()
    monkeypatch.setattr("dcx_kernels.cli.info._CHECKOUT", folder)
    monkeypatch.setattr(backend, "_native", lambda device: "does not load")
    assert _info(capsys)["_C_cpu"] == ["no record"]
    os.utime(sources / "README.md", (2000, 2000))
    assert _info(capsys)["_C_cpu"] == ["no record"]
    os.utime(sources / "cpu/a.cpp", (2000, 2000))
    older = "no record; older than csrc/, build it again: make native"
    assert _info(capsys)["_C_cpu"] == [older]
    (sources / "exports.map").unlink()  # a package, and a csrc of another one beside it
    assert _info(capsys)["_C_cpu"] == ["no record"]


def test_forcing_it_tells_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_BACKEND", "native")
    with pytest.raises(ValueError, match="not built: no library and no record"):
        backend.choose(torch.device("cpu"))

"""Every mode of DCX_BUILD, on machines that have everything and on machines that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import discover
import libraries
import pytest
import toolchain

CHECKOUT = Path(__file__).resolve().parents[2]
CPU, CUDA = "_C_cpu.abi3.so", "_C_cuda.abi3.so"


def _build(mode: str, folder: Path, **options: bool) -> dict[str, dict[str, str]]:
    libraries.build_all(mode, folder, folder / "scratch", **options)
    record: dict[str, dict[str, str]] = json.loads((folder / "_build.json").read_text())
    return record


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "torch_home", lambda: None)


def test_auto_builds_the_cpu_library(machine: Any, tmp_path: Path) -> None:
    machine.add_compiler()
    machine.add("nvcc")  # an nvcc on the PATH is not yet a wish for minutes of compilation
    record = _build("auto", tmp_path)
    assert (tmp_path / CPU).is_file()
    assert not (tmp_path / CUDA).exists()
    assert record["cpu"]["compiler"] == "g++ (made up) 1.2"
    assert record["cpu"]["torch"].startswith("2.")
    assert list(record["cuda"]) == ["not built"]
    assert "ops.cpp" in machine.compiled()


def test_auto_without_a_compiler_says_how_to_get_one(machine: Any, tmp_path: Path) -> None:
    (tmp_path / CPU).touch()  # of an earlier build: it must not be loaded as if it were of this one
    record = _build("auto", tmp_path)
    assert "no g++ on the PATH" in record["cpu"]["not built"]
    assert "apt-get install g++" in record["cpu"]["not built"]
    assert not (tmp_path / CPU).exists()


@pytest.mark.usefixtures("no_torch")
def test_auto_without_torch_says_what_to_install_first(machine: Any, tmp_path: Path) -> None:
    machine.add_compiler()
    reason = _build("auto", tmp_path)["cpu"]["not built"]
    assert "no torch >= 2.11" in reason
    assert "--no-build-isolation" in reason


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_what_is_asked_for_by_name_must_build(mode: str, machine: Any, tmp_path: Path) -> None:
    machine.add_compiler()
    with pytest.raises(discover.BuildError, match=f"DCX_BUILD={mode}: {CPU}: no torch"):
        _build(mode, tmp_path)


def test_cuda_without_a_toolkit_is_an_error(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add_compiler()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(discover.BuildError, match=f"DCX_BUILD=cuda: {CUDA}: CUDA_HOME: expected"):
        _build("cuda", tmp_path)
    assert machine.compiled() == []  # told before the other library is compiled


def test_none_builds_nothing_and_says_so(machine: Any, tmp_path: Path) -> None:
    machine.add_compiler()
    (tmp_path / CPU).touch()
    record = _build("none", tmp_path)
    assert not (tmp_path / CPU).exists()
    assert record["cpu"] == {"not built": "DCX_BUILD=none left it out (DCX_BUILD=cpu builds it)"}
    assert machine.compiled() == []


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_BUILD", "gpu")
    with pytest.raises(SystemExit, match="expected one of auto, cpu, cuda, none, got 'gpu'"):
        libraries.mode()


def test_auto_installs_without_what_does_not_compile(machine: Any, tmp_path: Path) -> None:
    machine.add_compiler()
    machine.refuse.touch()
    assert "error: no" in _build("auto", tmp_path)["cpu"]["not built"]
    with pytest.raises(discover.BuildError, match="error: no"):
        _build("cpu", tmp_path)
    with pytest.raises(discover.BuildError, match="error: no"):
        _build("auto", tmp_path, strict=True)  # a checkout's own build


def test_auto_builds_cuda_where_a_toolkit_is_named(
    machine: Any, tmp_path: Path, toolkit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add_compiler()
    home = toolkit("cuda")
    monkeypatch.setattr(discover, "ROOT", tmp_path)
    monkeypatch.setattr(toolchain, "ROOT", tmp_path)
    for name in ("compat.cpp", "ops.cpp", "cuda/kernel.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert "CUDA_HOME is not set" in _build("auto", tmp_path)["cuda"]["not built"]
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert _build("auto", tmp_path)["cuda"]["archs"] == "8.0 9.0a 10.0 12.0+PTX"
    assert f"-L{home}/lib64 -lcudart_static" in machine.log.read_text()
    (tmp_path / "cuda/kernel.cpp").unlink()
    assert _build("auto", tmp_path)["cuda"]["not built"] == "no sources: csrc/cuda is empty"


def test_script_runs_in_a_bare_python(tmp_path: Path) -> None:
    """Without site-packages, as on a machine that has Python and nothing else."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import libraries as l; from pathlib import"
    code += " Path; l.build_all('auto', Path(sys.argv[2]), Path(sys.argv[2]))"
    command = [sys.executable, "-S", "-E", "-c", code, str(CHECKOUT / "csrc"), str(tmp_path)]
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_C_cpu.abi3.so: not built: no C++ compiler" in done.stdout

"""``dcx info``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from rich.table import Table

from dcx_kernels._env import ENV_VARS, library_dir
from dcx_kernels.cli.console import make_console
from dcx_kernels.kernels import backend
from dcx_kernels.train.machine import describe_device, describe_machine, versions

__all__ = ["info"]

_CHECKOUT = Path(__file__).resolve().parents[2]
_COMPILED = {".cpp", ".cu", ".h", ".cuh"}


def info() -> int:
    """Print versions, devices, threads, environment variables, native libraries and backends."""
    console = make_console()
    console.print(_table("versions", list(versions().items())))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    machine = list(describe_machine().items())
    console.print(_table("machine", [*machine, *(("device", describe_device(d)) for d in devices)]))
    settings = [
        (name, f"{os.environ.get(name, 'not set')} - {meaning}")
        for name, meaning in ENV_VARS.items()
    ]
    console.print(_table("environment", settings))
    console.print(_table("native libraries", _libraries()))
    table = Table(title="backends", title_justify="left")
    for column in ("backend", "available", "why", "chosen for"):
        table.add_column(column)
    chosen = {device: _chosen(device) for device in devices}
    for name, available, reason in backend.describe():
        used = ", ".join(str(device) for device in devices if chosen[device] == name)
        table.add_row(name, "yes" if available else "no", reason, used)
    console.print(table)
    return 0


def _libraries() -> list[tuple[str, str]]:
    """Return what each library was built with; why one is missing is said by its backend."""
    path = library_dir() / "_build.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = []
    for name in ("cpu", "cuda"):
        used: dict[str, str] = record.get(name, {})
        facts = ", ".join(f"{what} {value}" for what, value in used.items())
        file = library_dir() / f"_C_{name}.abi3.so"
        if file.is_file():
            old = "; older than csrc/, build it again: make native" if _outdated(file) else ""
            rows.append((f"_C_{name}", f"{facts or 'no record'}{old}"))
        else:
            rows.append((f"_C_{name}", "not built"))
    return rows


def _outdated(library: Path) -> bool:
    """Tell whether a checkout has sources that are newer than the library."""
    sources = _CHECKOUT / "csrc"
    if not (sources / "exports.map").is_file():  # installed: the library came with the package
        return False
    built = library.stat().st_mtime
    files = (path for path in sources.rglob("*") if path.suffix in _COMPILED)
    return any(path.stat().st_mtime > built for path in files)


def _chosen(device: torch.device) -> str:
    """Return the row of the backend that serves a device; native has one for each kind."""
    name = str(backend.choose(device).NAME)
    return f"native ({device.type.upper()})" if name == "native" else name


def _table(title: str, pairs: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in pairs:
        table.add_row(key, value)
    return table

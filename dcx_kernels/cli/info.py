"""``dcx info``."""

from __future__ import annotations

import os

import torch
from rich.table import Table

from dcx_kernels._env import ENV_VARS
from dcx_kernels.cli.console import make_console
from dcx_kernels.kernels import backend
from dcx_kernels.train.machine import describe_device, describe_machine, versions

__all__ = ["info"]


def info() -> int:
    """Print versions, devices, threads, environment variables and backends."""
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
    table = Table(title="backends", title_justify="left")
    for column in ("backend", "available", "why", "chosen for"):
        table.add_column(column)
    chosen = {device: _chosen(device) for device in devices}
    for name, available, reason in backend.describe():
        used = ", ".join(str(device) for device in devices if chosen[device] == name)
        table.add_row(name, "yes" if available else "no", reason, used)
    console.print(table)
    return 0


def _chosen(device: torch.device) -> str:
    return backend.choose(device).__name__.rpartition(".")[2]


def _table(title: str, pairs: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in pairs:
        table.add_row(key, value)
    return table

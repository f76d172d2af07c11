"""Which backend runs, what forces another one, and what is said about it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dcx_kernels import ChannelSet, channel_conv2d
from dcx_kernels.kernels import backend, reference

CPU = torch.device("cpu")


def test_cpus_take_native_code_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCX_BACKEND", raising=False)
    native = ModuleType("native")
    monkeypatch.setattr(backend, "_native", lambda device: native)
    assert backend.choose(CPU) is native
    assert backend.choose(torch.device("meta")) is reference
    monkeypatch.setenv("DCX_BACKEND", "")
    assert backend.choose(CPU) is native
    monkeypatch.setenv("DCX_BACKEND", "reference")
    assert backend.choose(CPU) is reference


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_native_backends_say_which_operators_they_call(device: str) -> None:
    own = importlib.import_module(f"dcx_kernels.kernels.native.{device}")
    called: set[str] = set()
    for file in Path(str(own.__file__)).parent.glob("*.py"):
        called |= set(re.findall(r"\b(?:dcx)?_native\.(\w+)", file.read_text(encoding="utf-8")))
    assert called == set(own.OPERATORS)


def test_without_the_library_cpus_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCX_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_native", lambda device: f"not built for {device}")
    assert backend.choose(CPU) is reference
    rows = {row.name: row for row in backend.describe()}
    assert not rows["native (CPU)"].available
    assert rows["native (CUDA)"].reason == "not built for cuda"
    monkeypatch.setenv("DCX_BACKEND", "native")
    with pytest.raises(ValueError, match=r"DCX_BACKEND=native, got not built for cpu"):
        backend.choose(CPU)


def test_choose_refuses_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_BACKEND", "abacus")
    message = r"expected DCX_BACKEND to be one of \['native', 'reference'.*\], got 'abacus'"
    with pytest.raises(ValueError, match=message):
        backend.choose(CPU)
    weight = torch.randn(3, 2, 1, 1)
    with pytest.raises(ValueError, match=message):
        channel_conv2d(torch.randn(1, 2, 4, 4), weight, out_active=ChannelSet([1], 3))


def test_describe_gives_a_reason_for_each() -> None:
    rows = {row.name: row for row in backend.describe()}
    assert rows["reference"].available
    assert all(row.reason for row in rows.values())
    assert {"triton", "native (CPU)", "native (CUDA)"} <= rows.keys()


def test_triton_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("dcx_kernels.kernels.triton")
    monkeypatch.setenv("DCX_BACKEND", "triton")
    monkeypatch.setattr(triton, "serves", lambda device: device.type == "cuda")
    with pytest.raises(ValueError, match=r"expected a GPU .* for DCX_BACKEND=triton, got cpu"):
        backend.choose(CPU)
    monkeypatch.setattr(triton, "serves", lambda device: True)
    assert backend.choose(CPU) is triton


def test_triton_serves_recent_gpus_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("dcx_kernels.kernels.triton")
    monkeypatch.delenv("DCX_BACKEND", raising=False)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "_recent", lambda index: True)
    assert backend.choose(gpu) is triton
    monkeypatch.setattr(backend, "_recent", lambda index: False)
    assert backend.choose(gpu) is reference
    monkeypatch.setattr(backend, "_recent", lambda index: True)
    monkeypatch.setattr(backend, "_triton", lambda: "not installed (no module)")
    assert backend.choose(gpu) is reference
    rows = {row.name: row for row in backend.describe()}
    assert not rows["triton"].available and "not installed" in rows["triton"].reason
    monkeypatch.setenv("DCX_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"expected Triton, .* got not installed"):
        backend.choose(gpu)

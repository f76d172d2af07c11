"""``dcx inspect`` and ``dcx info`` print what they promise."""

from __future__ import annotations

import pytest
import torch

from dcx_kernels.cli import main


def test_inspect_lists_groups_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vgg19", "--width", "0.5", "--density", "0.3"]) == 0
    text = capsys.readouterr().out
    for word in ("features.0", "features.49", "classifier", "selectable", "fully connected"):
        assert word in text
    first = next(line for line in text.splitlines() if "features.0 " in line)
    assert first.split()[3:6:2] == ["32", "9"]
    assert "8.88 M (9 %)" in text


def test_inspect_whole_network_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vgg19"]) == 0
    text = capsys.readouterr().out
    assert "20.04 M" in text
    assert "398.14 M (100 %)" in text


def test_info_prints_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__.split("+")[0], "threads", "backends", "reference", "chosen for"):
        assert word in text
    row = next(line for line in text.splitlines() if line.startswith("\u2502 reference"))
    assert "cpu" in row.split("\u2502")[4]


def test_info_with_an_unknown_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCX_BACKEND", "abacus")
    assert main(["info"]) == 2
    assert "abacus" in capsys.readouterr().err

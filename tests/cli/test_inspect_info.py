"""``dcx inspect`` and ``dcx info`` print what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcx_kernels.cli import main
from dcx_kernels.kernels.backend import choose


def _inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[list[str]]]:
    """Return the words of each table's rows, by the table's title."""
    assert main(["inspect", *arguments]) == 0
    tables: dict[str, list[list[str]]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line[:1].strip():  # rows are indented
            tables[line.strip()] = []
        elif line.strip():
            tables[list(tables)[-1]].append(line.split())
    return tables


def test_inspect_lists_groups_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    groups, kept, cost = _inspect(capsys, "vgg19", "--width", "0.5", "--density", "0.3").values()
    assert ["features.0", "32", "9", "3"] in [row[:4] for row in groups]
    assert len(groups) == 2 + 16
    assert kept[2:] == [["classifier", "10", "output", "of", "the", "network"]]
    rows = {row[0]: row[1:] for row in cost}
    assert rows["features.3"][:2] == ["9/32", "9/32"]
    assert rows["features.3"][2].startswith("\u2588\u2588")  # the bar: 9/32 of ten cells
    assert rows["features.3"][3:] == ["0.73/9.22", "k", "0.75/9.44", "M", "36.00/128.00", "KiB"]
    assert rows["total"][2:4] == ["8.88/99.98", "M"]
    assert rows["share"][2:4] == ["8.9", "%"]


def test_inspect_whole_network_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, cost = _inspect(capsys, "vgg19").values()
    assert cost[-2][:5] == ["total", "20.04", "M", "398.14", "M"]
    assert cost[-1] == ["share", "100.0", "%", "100.0", "%", "100.0", "%"]


def _macs(tables: dict[str, list[list[str]]]) -> float:
    return float(list(tables.values())[-1][-1][3])


def test_inspect_residual_policies_seeds_and_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "new" / "widths.png"
    common = ("resnet20", "--density", "0.3")
    keep = _inspect(capsys, *common)
    union = _inspect(capsys, *common, "--residual", "union", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    del union[f"{picture}: widths and MACs of every layer"]
    assert "resnet20, residual union, grouped keep" in union
    assert "random channels, seed 0" in list(union)[-1]
    assert list(keep)[1] == "groups kept full"
    assert 9 < _macs(union) < 20 < _macs(keep) < 40
    widths = [row[1] for row in list(union.values())[-1] if row[0] == "layer3.2.conv1"]
    assert 19 < int(widths[0].split("/")[0]) < 64  # three random sets of 19 do not coincide
    other = _inspect(capsys, *common, "--residual", "union", "--seed", "1")
    assert list(other.values())[-1] != list(union.values())[-1]
    again = _inspect(capsys, *common, "--residual", "union")
    assert list(again.values())[-1] == list(union.values())[-1]


def test_inspect_ties_the_stream_of_torchvisions_resnet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("resnet18", "--density", "0.5", "--classes", "7")
    _, kept, keep = _inspect(capsys, *arguments).values()
    assert {"conv1", "layer2.0.conv2", "fc"} <= {row[0] for row in kept}
    _, kept, tie = _inspect(capsys, *arguments, "--residual", "tie").values()
    assert [row[0] for row in kept[2:]] == ["fc"]
    rows = {row[0]: row[1:3] for row in tie}
    assert rows["layer2.1.conv2"] == ["64/128", "64/128"]
    assert rows["fc"] == ["256/512", "7"]
    assert tie[-1][3] == "26.6"  # a quarter, but for the stem with its three inputs: half
    assert float(keep[-1][3]) > 45


def test_inspect_draws_as_many_channels_from_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--density", "0.4", "--grouped", "equal", "--image-size", "64")
    groups = next(iter(_inspect(capsys, "regnet_y_400mf", *options).values()))
    rows = {row[0]: row[1:5] for row in groups}
    # 3 of each 8, where 0.4 of them all are 41
    assert rows["trunk_output.block2.block2-0.f.a.0"] == ["104", "(13", "runs)", "39"]


def test_inspect_timm_and_leaf_modules(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    leaf = "timm.models.resnetv2.PreActBottleneck"
    _, kept, cost = _inspect(capsys, "timm:resnetv2_50", "--leaf-module", leaf).values()
    assert any("PreActBottleneck" in word for row in kept for word in row)
    assert len(cost) > 3


def test_info_prints_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__.split("+")[0], "threads", "backends", "reference", "chosen for"):
        assert word in text
    chosen = choose(torch.device("cpu")).NAME
    row = next(line for line in text.splitlines() if line.startswith(f"\u2502 {chosen}"))
    assert "cpu" in row.split("\u2502")[4]


def test_info_with_an_unknown_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCX_BACKEND", "abacus")
    assert main(["info"]) == 2
    assert "abacus" in capsys.readouterr().err

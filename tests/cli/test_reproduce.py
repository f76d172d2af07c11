"""``dcx reproduce``: the list, the table, every wrong option, and going on."""

from __future__ import annotations

import csv
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dcx_kernels.cli import main
from dcx_kernels.recipes.reproduce_target import target_names

FILES = {"table.csv", "table.md", "runs.csv", "figure.png"}
Start = Callable[[list[str]], "subprocess.Popen[str]"]
Arguments = Callable[..., list[str]]


@pytest.fixture
def reproduce(data_file: Path) -> Arguments:
    """Return the arguments of a target in tiny."""

    def build(target: str, out: Path, *more: str) -> list[str]:
        scale = ["--width", "0.0625", "--epochs", "1", "--batch-size", "16", "--lr", "0.05"]
        given = ["--data", str(data_file), "--out", str(out), "--threads", "1"]
        return ["reproduce", target, *given, *scale, *more]

    return build


def test_list_shows_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    for name in target_names():
        assert name in text


def test_help_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert set(target_names()) <= set(words)


def test_list_of_a_target_shows_lines_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "dce-table2", "--list", "--densities", "0.3"]) == 0
    text = capsys.readouterr().out
    assert "accuracy 90.98, change -0.36" in text
    assert "recipe: epochs 160, batch_size 64, lr 0.1" in text
    assert "variant single-stage: recipe dce, procedure single-stage" in text
    assert "89.4" not in text  # density 0.2 was not asked for


def test_table_figure_and_files(
    reproduce: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--densities", "0.4", "--models", "vgg19", "--seeds", "0"]
    assert main(reproduce("dce-table1", tmp_path, *more)) == 0
    text = capsys.readouterr().out
    assert "SCALED DOWN: epochs 1 (paper 160)" in text
    assert "width x 0.0625" in text and "1 seed (3)" in text
    line = next(line for line in text.splitlines() if line.startswith("   two-stage"))
    assert line.split()[1:4] == ["0.4", "1/1", "92.02"]
    assert "no data, give --data svhn=SOURCE" in text
    folder = tmp_path / "dce-table1"
    assert {p.name for p in folder.iterdir()} == FILES
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert float(rows[1]["accuracy % (paper)"]) == 92.02
    assert 0 <= float(rows[1]["accuracy %"]) <= 100
    assert rows[2]["accuracy %"] == ""  # CIFAR-100: no data
    before = (tmp_path / "results.jsonl").read_bytes()
    assert main(reproduce("dce-table1", tmp_path, *more)) == 0
    assert "2 trainings, 2 of them finished before" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_budget(reproduce: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--densities", "0.4", "--models", "vgg19", "--seeds", "0", "--budget", "0.001s"]
    assert main(reproduce("dce-table1", tmp_path, *more)) == 0
    text = capsys.readouterr().out
    missing = "missing: 2 trainings, the budget is spent: vgg19/cifar10/baseline/1/seed 0, "
    assert missing in text
    assert not (tmp_path / "results.jsonl").exists()
    assert not (tmp_path / "dce-table1" / "figure.png").exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("dce-table9", [], "near: dce-table"),
        ("dce-table1", ["--densities", "0.55"], "densities out of 0.3, 0.4, 0.7, 0.8, 0.9, got"),
        ("dce-table1", ["--seeds", "1,1"], "different seeds of at least 0, got 1,1"),
        ("dce-table1", ["--models", "vgg91"], "models out of vgg19, resnet50, densenet121, got"),
        ("dce-table1", ["--variants", "x"], "variants out of baseline, two-stage, got 'x'"),
        ("dce-table1", ["--budget", "soon"], "--budget such as 90s, 30m or 1.5h, got 'soon'"),
        ("dce-table1", ["--budget", "0m"], "--budget such as 90s, 30m or 1.5h, got '0m'"),
        ("dce-table1", ["--epochs", "0"], "--epochs of at least 1, got 0"),
        ("dce-table1", ["--width", "0"], "a positive --width, got 0"),
        ("dce-table1", ["--data", "nowhere.npz"], "one --data for cifar10"),
        ("dce-table1", ["--data", "svhn=nowhere"], "got 'nowhere', which does not exist"),
        ("dce-table1", ["--threads", "0"], "--threads of at least 1, got 0"),
        ("dce-table1", ["--device", "abacus"], "a device such as cpu"),
        ("dce-table1", ["--models", "resnet50"], "width 1 (only"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_a_sentence(
    reproduce: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert main(reproduce(target, out, *options)) == 2
    text = capsys.readouterr().err
    assert text.startswith("dcx reproduce: ") and text.count("\n") == 1
    assert message in text
    assert not out.exists()  # before anything is trained


def test_a_target_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 2
    assert "expected a target out of dce-figure3, dce-table1" in capsys.readouterr().err
    assert main(["reproduce", "dce-table1"]) == 2
    assert "expected --data cifar10=SOURCE or" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(
    reproduce: Arguments, start: Start, tmp_path: Path
) -> None:
    more = ["--densities", "0.2,0.9", "--seeds", "0,1", "--epochs", "3"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(reproduce("dce-table2", whole, *more)) == 0
    process = start(reproduce("dce-table2", stopped, *more))
    deadline = time.monotonic() + 120
    while not list(stopped.glob("runs/*single-stage*/log.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command continues" in errors
    assert main(reproduce("dce-table2", stopped, *more)) == 0
    name = "dce-table2/table.csv"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()

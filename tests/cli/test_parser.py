"""The options are pinned: adding or renaming one is a decision, and this is where it is made."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from dcx_kernels.cli import main as entry
from dcx_kernels.cli.export import export
from dcx_kernels.cli.info import info
from dcx_kernels.cli.inspect import inspect as inspect_command
from dcx_kernels.cli.main import COMMANDS
from dcx_kernels.cli.parser import build_parser
from dcx_kernels.cli.reproduce import reproduce
from dcx_kernels.cli.train import train
from dcx_kernels.models import MODELS
from dcx_kernels.recipes.config import METHODS

OPTIONS = {
    "train": """--augment --batch-size --channels-last --checkpoint-every --compare --data
        --decay --decay-policy --decay-scope --density --device --download --epochs --final
        --finetune-epochs --help --image-size --inactive --initial --lr --method --milestones
        --min-active --model --momentum --no-augment --no-onnx --no-recalibrate --onnx --out
        --procedure --recalibrate --residual --resume --round-to --saliency --seed --select-epochs
        --selector --strict --tau --tensorboard --threads --traceback --warmup-epochs
        --weight-decay --weights --width""",
    "inspect": """--classes --density --grouped --help --image-size --leaf-module --plot --residual
        --seed --traceback --width model""",
    "export": "--classes --help --image-size --model --onnx --thin --traceback --width source",
    "reproduce": """--batch-size --budget --channels-last --data --densities --device --epochs
        --help --image-size --list --lr --models --out --seeds --threads --traceback
        --train-images --variants
        --width target""",
    "info": "--help --traceback",
}


def _subparsers() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no subcommands")


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_pinned(command: str) -> None:
    found = set()
    for action in _subparsers()[command]._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        found |= set(names) or {action.dest}
    assert found == set(OPTIONS[command].split())


def test_every_command_has_a_function() -> None:
    assert set(_subparsers()) == set(COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize(
    ("command", "function", "minimal"),
    [
        ("train", train, ["--out", "x"]),
        ("inspect", inspect_command, ["vgg19"]),
        ("export", export, ["x"]),
        ("reproduce", reproduce, []),
        ("info", info, []),
    ],
)
def test_options_are_the_arguments_of_the_function(
    command: str, function: object, minimal: list[str]
) -> None:
    options = set(vars(build_parser().parse_args([command, *minimal]))) - {"command", "traceback"}
    assert callable(function)
    parameters = set(inspect.signature(function).parameters)
    if "settings" in parameters:
        fields = {name for kind in METHODS.values() for name in kind.names()}
        parameters = (parameters - {"settings"}) | (fields - {"recalibrate_batches"})
    assert options == parameters


@pytest.mark.parametrize("command", OPTIONS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        entry([command, "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    if command != "info":
        assert "examples:" in text
        assert f"dcx {command} " in text


def test_help_explains_both_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("selection with --method dce", "selection with --method dcp", "0.6, 0.7, 1 with"):
        assert words in text
    for method in METHODS:
        assert f"--method {method}" in text


@pytest.mark.parametrize("command", ["train", "inspect", "export"])
def test_help_names_every_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry([command, "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    for name in [*MODELS, "torchvision's", "timm:NAME"]:
        assert name in words


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["train"],
        ["train", "--out", "x", "--epochs", "many"],
        ["train", "--out", "x", "--nonsense"],
        ["train", "--out", "x", "--milestones", "one,two"],
        ["reproduce", "dce-table1", "--seeds", "first"],
        ["reproduce", "dce-table1", "--densities", "half"],
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        entry(arguments)
    assert done.value.code == 2


def test_parser_imports_nothing_heavy() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    source = (root / "dcx_kernels" / "cli" / "parser.py").read_text(encoding="utf-8")
    code = "import sys; exec(sys.stdin.read()); build_parser(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

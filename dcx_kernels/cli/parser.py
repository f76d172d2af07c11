"""The options of every subcommand, and the help that explains them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["build_parser"]

_TRAIN = """\
Train a network in which, at each step, only the selected channels exist; then cut the final
selection out as a plain, thin network and fine-tune that. With --compare, the same is done the
papers' way (mask: compute everything, multiply by zero) and without selection (dense), from the
same weights and with the same batches; one table shows accuracy, size, time and memory.
"""

_TRAIN_EXAMPLES = """\
examples:
  the demo, a few minutes on two cores:
    dcx train --data digits --model vgg19 --width 0.5 --density 0.4 --compare mask,dense \\
        --out runs/demo
  the paper's VGG-19 on CIFAR-10 (a folder that holds cifar-10-batches-py), on a GPU:
    dcx train --data ~/data --model vgg19 --density 0.4 --procedure two-stage --epochs 160 \\
        --batch-size 64 --lr 0.1 --device cuda --channels-last --out runs/vgg19-40
  a residual network whose stream shrinks too:
    dcx train --data digits --model resnet18 --residual tie --out runs/resnet18-tie
  go on after Ctrl-C, a crash or a full disk: the same command with --resume.

procedures: single-stage selects for --select-epochs, then freezes the topology and trains on;
two-stage selects for all epochs. Then the thin network is fine-tuned, with a fresh optimizer. As
long as there are few steps, selection explores, every step trains another network and none learns
much: with some hundred steps take single-stage, with 100 thousand the paper prefers two-stage.

residual networks: where an add joins channels, --residual keep leaves them all (the papers), so
that only channels inside of the blocks go; tie selects them together, once for the whole stream;
union lets every branch have its own, and the sum has those of any. (resnet20, 32 and 56 pad their
shortcuts with zeros: a stream that grows so cannot be tied, and stays full.)

what --out holds afterwards:
  report.html  figures, table, configuration    result.json  the same numbers
  log.jsonl    one row per step and epoch       checkpoints/ one per network, for --resume
  thin.safetensors, thin.onnx                   the thin network

--data accepts: digits; a folder with cifar-10-batches-py or cifar-100-python, or that folder; an
.npz file with train_images (uint8, NHWC), train_labels, test_images, test_labels.
"""

_INSPECT = """\
List a network's channel groups, which of them stay full-width and why, and what each layer costs:
widths, parameters, multiply-accumulates and activations of one image, active of all.

With --density below 1 the same share of every selectable group is active: random channels, so that
a union of two groups is as wide as it is on average; --seed says which. (Training ranks all
channels of the network together; then groups differ.)
"""

_INSPECT_EXAMPLES = """\
examples:
  every layer of a network:          dcx inspect vgg19
  what 30 % of its channels cost:    dcx inspect vgg19 --width 0.5 --density 0.3
  torchvision's, with the residual stream shrinking too, and a picture of it:
    dcx inspect resnet50 --density 0.3 --residual tie --plot widths.png
  grouped convolutions selected too, at the size of ImageNet:
    dcx inspect resnext50_32x4d --density 0.5 --grouped equal --image-size 224 --classes 1000
  timm's; a module that torch.fx cannot follow is kept whole by the name of its class:
    dcx inspect timm:resnetv2_50 --density 0.5
    dcx inspect timm:NAME --leaf-module timm.layers.blur_pool.BlurPool2d
"""

_EXPORT_EXAMPLES = """\
examples:
  the thin network of a run:            dcx export runs/demo --onnx thin.onnx
  a thin file beside its run:           dcx export runs/demo/thin.safetensors --onnx thin.onnx
  a training checkpoint, as it is now:
    dcx export runs/demo/checkpoints/sparse/latest.safetensors --onnx now.onnx
  a thin file from elsewhere:           dcx export thin.safetensors --model vgg19 --width 0.5 \\
                                            --classes 10 --onnx thin.onnx
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``dcx``."""
    parser = argparse.ArgumentParser(
        prog="dcx",
        description="Train CNNs in which only the chosen channels exist.",
        epilog="dcx COMMAND --help explains a command, with examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(_command(commands, "train", "train, compare, fine-tune", _TRAIN, _TRAIN_EXAMPLES))
    short = "groups and costs"
    _add_inspect(_command(commands, "inspect", short, _INSPECT, _INSPECT_EXAMPLES))
    text = "Write a trained thin network as ONNX or as a thin checkpoint; print widths and cost."
    _add_export(_command(commands, "export", "ONNX, thin checkpoint", text, _EXPORT_EXAMPLES))
    text = "Print versions, devices, threads, and which backend is chosen and why."
    _command(commands, "info", "versions and backends", text, "")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=short, description=description, epilog=examples, formatter_class=form
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("--data", default="digits", help="data set, see below (digits)")
    what.add_argument("--model", default="vgg19", help=f"{_MODELS} (vgg19)")
    what.add_argument("--width", type=float, default=1.0, help=_WIDTH)
    what.add_argument("--out", type=Path, required=True, help="directory for the results")
    what.add_argument(
        "--compare", type=_names, default=(), metavar="LIST", help="any of mask,dense (none)"
    )
    selection = parser.add_argument_group("selection")
    selection.add_argument("--density", type=float, default=0.4, help="share of channels (0.4)")
    selection.add_argument("--selector", default="cucb", help="cucb, random or static (cucb)")
    selection.add_argument("--residual", default="keep", help="keep, tie or union, below (keep)")
    selection.add_argument(
        "--procedure", default="single-stage", help="single-stage or two-stage (single-stage)"
    )
    selection.add_argument(
        "--select-epochs", type=int, help="single-stage: epochs before freezing (a quarter)"
    )
    selection.add_argument("--saliency", default="batch", help="reduction: batch or sample (batch)")
    selection.add_argument("--tau", type=int, help="random steps first (until all were active)")
    selection.add_argument("--min-active", type=int, default=1, help="per group (1)")
    selection.add_argument("--round-to", type=int, default=1, help="multiples for widths (1)")
    selection.add_argument(
        "--inactive", default="frozen", help="inactive weights: frozen or decay (frozen)"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=DEFAULT_EPOCHS, help="(%(default)s)")
    training.add_argument(
        "--finetune-epochs",
        type=int,
        help="epochs of the thin network; 0: only cut it out (as --epochs)",
    )
    training.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help="(%(default)s)")
    training.add_argument("--lr", type=float, default=DEFAULT_LR, help="(%(default)s)")
    training.add_argument("--momentum", type=float, default=0.9, help="Nesterov (0.9)")
    training.add_argument("--weight-decay", type=float, default=1e-4, help="(1e-4)")
    training.add_argument(
        "--augment", action=_BOOLEAN, default=True, help="augment as suits the data (yes)"
    )
    training.add_argument(
        "--recalibrate",
        action=_BOOLEAN,
        default=True,
        help="measure batch-norm statistics again for the final selection (yes)",
    )
    training.add_argument("--seed", type=int, default=0, help="(0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (cpu)")
    machine.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    machine.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    machine.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="beside one after each epoch"
    )
    machine.add_argument("--resume", action="store_true", help="continue the run in --out")
    machine.add_argument("--onnx", action=_BOOLEAN, default=True, help="write thin.onnx (yes)")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=_MODELS)
    parser.add_argument("--width", type=float, default=1.0, help=_WIDTH)
    parser.add_argument("--density", type=float, default=1.0, help="share of each group (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random channels (0)")
    parser.add_argument(
        "--residual",
        default="keep",
        help="groups joined by an add: keep all, tie them, or union of their channels (keep)",
    )
    parser.add_argument(
        "--grouped",
        default="keep",
        help="grouped convolutions: keep all channels, or equal counts in each group (keep)",
    )
    parser.add_argument(
        "--leaf-module",
        action="append",
        default=[],
        metavar="QUALIFIED.NAME",
        help="class of modules that are kept whole; may be given again",
    )
    parser.add_argument("--classes", type=int, default=10, help="outputs (10)")
    parser.add_argument("--image-size", type=int, default=32, help="height and width (32)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture: png, pdf or svg")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a run directory, thin file or checkpoint")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write ONNX here")
    parser.add_argument("--thin", type=Path, metavar="FILE", help="write a thin checkpoint here")
    parser.add_argument("--model", help=f"for a thin file without its run: {_MODELS}")
    parser.add_argument("--width", type=float, help="for a thin file without its run")
    parser.add_argument("--classes", type=int, help="for a thin file without its run")
    parser.add_argument("--image-size", type=int, default=32, help="height and width (32)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


# written out, as the networks themselves import torch; a test compares
_MODELS = (
    "network: m_cifarnet, resnet20, resnet32, resnet56, vgg16 or vgg19; torchvision's by name "
    "(torchvision:vgg16 for its own of that name); timm:NAME"
)
_WIDTH = "factor on all channels, of our own networks (1.0)"
_BOOLEAN = argparse.BooleanOptionalAction
# what suits the demo: few steps, so few of selection, and a learning rate that survives it
DEFAULT_EPOCHS = 6
DEFAULT_BATCH = 32
DEFAULT_LR = 0.02

"""The options of every subcommand, and the help that explains them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["build_parser"]

_TRAIN = """\
Train a network in which, at each step, only the selected channels exist; then cut the final
selection out as a plain, thin network. --method says whose procedure that follows: dce fine-tunes
the thin network, dcp trains once and is done. With --compare, the same is done the papers' way
(mask: compute everything, multiply by zero) and without selection (dense), from the
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
  dynamic channel propagation: 60 % of the channels, one training, no fine-tuning:
    dcx train --data digits --model vgg16 --width 0.25 --method dcp --density 0.6 --epochs 12 \\
        --out runs/dcp
  as its paper's code trains VGG-16 on CIFAR-10; then ResNet-32 from a trained one:
    dcx train --data ~/data --model vgg16 --method dcp --density 0.6 --epochs 200 --lr 0.1 \\
        --milestones 100,150,190 --batch-size 64 --device cuda --out runs/vgg16-60
    dcx train --data ~/data --model resnet32 --method dcp --density 0.5 --epochs 200 --lr 0.01 \\
        --decay 0.7 --weights resnet32.pt --device cuda --out runs/resnet32-50
  a residual network whose stream shrinks too:
    dcx train --data digits --model resnet18 --residual tie --out runs/resnet18-tie
  photographs in class folders (path/train/CLASS/*.jpg and path/val/CLASS/*.jpg), at 64 pixels:
    dcx train --data folder:path --image-size 64 --model resnet18 --out runs/photographs
  the paper's SVHN (1.9 GB of images, downloaded once into ~/svhn), with curves to watch:
    dcx train --data svhn:~/svhn --download --tensorboard --out runs/svhn
    tensorboard --logdir runs/svhn/tensorboard
  go on after Ctrl-C, a crash or a full disk: the same command with --resume.

methods:
  dce  dynamic channel execution: a bandit (CUCB) tries the channels of the whole network and keeps
       those of the highest mean saliency. The learning rate is divided by 10 at 1/2 and 3/4.
  dcp  dynamic channel propagation: all channels are active in the warm-up; then, at each step,
       those of the highest utility. An active channel's utility is multiplied by lambda (--decay)
       and its saliency is added; the others keep theirs. At the --milestones the learning rate is
       divided by 10 and lambda moves: 0.6, 0.7, 1 with --decay-policy increase; at 1 the selection
       stops. A short warm-up ranks channels by few batches: give it some of the epochs.

procedures of dce: single-stage selects for --select-epochs, then freezes the topology and trains
on; two-stage selects for all epochs. Then the thin network is fine-tuned, with a fresh optimizer.
As long as there are few steps, selection explores, every step trains another network and none
learns much: with some hundred steps take single-stage, with 100 thousand the paper prefers
two-stage.

residual networks: where an add joins channels, --residual keep leaves them all (the papers), so
that only channels inside of the blocks go; tie selects them together, once for the whole stream;
union lets every branch have its own, and the sum has those of any. (resnet20, 32 and 56 pad their
shortcuts with zeros: a stream that grows so cannot be tied, and stays full.)

what --out holds afterwards:
  report.html  figures, table, configuration    result.json  the same numbers
  log.jsonl    one row per step and epoch       checkpoints/ one per network, for --resume
  thin.safetensors, thin.onnx                   the thin network
  tensorboard/ its event files, with --tensorboard

--data accepts:
  digits            1797 handwritten digits that come with scikit-learn
  PATH              a folder with cifar-10-batches-py or cifar-100-python in it, or that folder
  FILE.npz          with train_images (uint8, NHWC), train_labels, test_images, test_labels
  svhn:PATH         train_32x32.mat, extra_32x32.mat and test_32x32.mat, training on train and extra
  svhn-train:PATH   the same without extra
  folder:PATH       image files in train/CLASS and val/CLASS (or test/CLASS) folders; in CLASS
                    folders only: a fifth of each class is held out to test on
All images are held in memory, at --image-size. Those of a folder are decoded once, scaled and cut
to a central square; more than fit into half of the memory are refused before that.
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

_REPRODUCE = """\
Train what a table or figure of a paper is about, by the paper's recipe, and print the published
numbers and ours side by side. Every training is done once and kept in --out, whichever target needs
it; the same command goes on where it stopped. What is scaled down stands in the title.
"""

_REPRODUCE_EXAMPLES = """\
examples:
  what there is, and what a target takes:
    dcx reproduce --list
    dcx reproduce dce-table1 --list
  the whole of VGG-19 on CIFAR-10 in Table 1, three seeds, on a GPU:
    dcx reproduce dce-table1 --data cifar10=~/data/cifar-10-batches-py --models vgg19 \\
        --device cuda --channels-last
  the same table with all its data sets:
    dcx reproduce dce-table1 --data cifar10=PATH --data cifar100=PATH --data svhn=svhn:PATH
  as much as half an hour on a CPU gives, of a small network; later the same command again:
    dcx reproduce dce-figure3 --data cifar.npz --models vgg19 --width 0.25 --densities 0.3,0.5 \\
        --seeds 0,1 --epochs 8 --budget 30m
  a study of your own, written like the files in dcx_kernels/recipes/targets, in two shells:
    dcx reproduce my-study.json --data cifar10=cifar.npz --seeds 0 --threads 1
    dcx reproduce my-study.json --data cifar10=cifar.npz --seeds 1 --threads 1
  a try on digits that come with scikit-learn, a minute or two:
    dcx reproduce fbs-table4 --data digits --epochs 2 --width 0.125 --lr 0.05 --batch-size 64

targets: dce-table1, dce-table2, dce-figure3 (dynamic channel execution); dcp-table1, dcp-table2,
dcp-table4, dcp-figures (dynamic channel propagation); fbs-figure3, fbs-table3, fbs-table4 (feature
boosting and suppression).

--data NAME=SOURCE says what is read for the paper's data set NAME; a SOURCE alone stands for the
first one of the target. Sources are those of dcx train; lines about other data sets are left out.
With --epochs, milestones, warm-ups and single stages keep their share. A smaller --width or --lr,
another --batch-size, fewer --train-images, --seeds, --densities, --models, --variants: all is said
in the title.
Ordinary networks that a table compares with are always trained. --budget is looked at before each
training; seeds come one after the other, so that what is there is whole tables of fewer seeds.

what --out holds afterwards:
  results.jsonl        one row per training: numbers, settings, seed, commit, machine, wall time
  runs/                checkpoints and logs; without them only what is under way is lost
  TARGET/table.csv     paper and ours, mean and deviation   TARGET/runs.csv  its trainings
  TARGET/table.md      the same to be read, with notes, machine and commit
  TARGET/figure.png    and more figures where there are some
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
    short = "tables and figures of the papers"
    _add_reproduce(_command(commands, "reproduce", short, _REPRODUCE, _REPRODUCE_EXAMPLES))
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
    what.add_argument(
        "--download", action="store_true", help="fetch missing files of svhn:PATH first"
    )
    what.add_argument(
        "--image-size", type=int, default=32, help="height and width to scale images to (32)"
    )
    what.add_argument("--model", default="vgg19", help=f"{_MODELS} (vgg19)")
    what.add_argument("--width", type=float, default=1.0, help=_WIDTH)
    what.add_argument(
        "--weights",
        metavar="FILE",
        help="start from trained weights: a state_dict (.pt, .safetensors), a checkpoint, or a run "
        "directory with a dense network (random)",
    )
    what.add_argument("--out", type=Path, required=True, help="directory for the results")
    what.add_argument(
        "--compare", type=_names, default=(), metavar="LIST", help="any of mask,dense (none)"
    )
    selection = parser.add_argument_group("selection")
    selection.add_argument("--method", default="dce", help="dce or dcp, below (dce)")
    selection.add_argument("--density", type=float, default=0.4, help="share of channels (0.4)")
    selection.add_argument(
        "--selector", help="the method's own, or for comparison random or static (its own)"
    )
    selection.add_argument("--residual", default="keep", help="keep, tie or union, below (keep)")
    selection.add_argument("--saliency", help="batch or sample mean (dce batch, dcp sample)")
    selection.add_argument("--min-active", type=int, default=1, help="per group (1)")
    selection.add_argument("--round-to", type=int, default=1, help="multiples for widths (1)")
    selection.add_argument(
        "--inactive", default="frozen", help="inactive weights: frozen or decay (frozen)"
    )
    _add_dce(parser.add_argument_group("selection with --method dce"))
    _add_dcp(parser.add_argument_group("selection with --method dcp"))
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=DEFAULT_EPOCHS, help="(%(default)s)")
    training.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help="(%(default)s)")
    training.add_argument("--lr", type=float, default=DEFAULT_LR, help="(%(default)s)")
    training.add_argument("--momentum", type=float, default=0.9, help="Nesterov with dce (0.9)")
    training.add_argument("--weight-decay", type=float, default=1e-4, help="(1e-4)")
    training.add_argument(
        "--augment", action=_BOOLEAN, default=True, help="augment as suits the data (yes)"
    )
    training.add_argument(
        "--recalibrate",
        action=_BOOLEAN,
        help="measure batch-norm statistics again for the final selection (dce yes, dcp no)",
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
    machine.add_argument(
        "--tensorboard", action="store_true", help="write curves into OUT/tensorboard too"
    )
    machine.add_argument("--onnx", action=_BOOLEAN, default=True, help="write thin.onnx (yes)")


def _add_dce(selection: argparse._ArgumentGroup) -> None:
    selection.add_argument("--procedure", help="single-stage or two-stage (single-stage)")
    selection.add_argument(
        "--select-epochs", type=int, help="single-stage: epochs before freezing (a quarter)"
    )
    selection.add_argument("--tau", type=int, help="random steps first (until all were active)")
    selection.add_argument("--final", help="final channels: best, or random for comparison (best)")
    selection.add_argument(
        "--finetune-epochs",
        type=int,
        help="epochs of the thin network; 0: only cut it out (as --epochs)",
    )


def _add_dcp(selection: argparse._ArgumentGroup) -> None:
    selection.add_argument(
        "--warmup-epochs",
        type=int,
        help="epochs with all channels (10, at most a sixth of --epochs, at least 1)",
    )
    selection.add_argument(
        "--milestones",
        type=_integers,
        metavar="LIST",
        help="epochs such as 100,150 at which learning rate and lambda move (at 1/3 and 2/3)",
    )
    selection.add_argument("--decay", type=float, help="lambda at the start (0.6)")
    selection.add_argument(
        "--decay-policy", help="lambda at milestones: increase, divide or constant (increase)"
    )
    selection.add_argument(
        "--decay-scope", help="whose utility decays: of selected channels, or all (selected)"
    )
    selection.add_argument(
        "--strict",
        action="store_true",
        default=None,
        help="only channels above the pN-th smallest utility: fewer where utilities tie (no)",
    )
    selection.add_argument(
        "--initial", help="utilities at the start: zero, or inverse: 1 / channels (ResNets inverse)"
    )


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


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="table or figure, or a study such as my.json")
    parser.add_argument(
        "--list", dest="listing", action="store_true", help="show the targets, or one's lines"
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]SOURCE", help="see below; may repeat"
    )
    results = Path("reproduced")
    parser.add_argument("--out", type=Path, default=results, help="directory (%(default)s)")
    part = parser.add_argument_group("part of the target (all of it)")
    part.add_argument("--seeds", type=_integers, metavar="LIST", help="such as 0,1")
    part.add_argument("--densities", type=_numbers, metavar="LIST", help="such as 0.3,0.5")
    part.add_argument("--models", type=_names, metavar="LIST", help="networks of the target")
    part.add_argument("--variants", type=_names, metavar="LIST", help="variants of the target")
    scale = parser.add_argument_group("scale (the paper's)")
    scale.add_argument("--epochs", type=int, help="of every training")
    scale.add_argument("--width", type=float, help=_WIDTH)
    scale.add_argument("--batch-size", type=int, help="images per step")
    scale.add_argument("--lr", type=float, help="learning rate at the start")
    scale.add_argument("--image-size", type=int, help="height and width")
    scale.add_argument("--train-images", type=int, metavar="COUNT", help="use the first ones only")
    scale.add_argument("--budget", metavar="TIME", help="begin no training after 90s, 30m, 1.5h")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (cpu)")
    machine.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    machine.add_argument("--threads", type=int, help="CPU threads (torch's choice)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in _names(text))
    except ValueError:
        what = f"expected whole numbers such as 100,150, got {text!r}"
        raise argparse.ArgumentTypeError(what) from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in _names(text))
    except ValueError:
        what = f"expected numbers such as 0.3,0.5, got {text!r}"
        raise argparse.ArgumentTypeError(what) from None


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

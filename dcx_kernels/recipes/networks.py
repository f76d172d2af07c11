"""Networks by name: ours, torchvision's and timm's, without weights; and whether one fits."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.models import MODELS, build

__all__ = ["build_network", "check_runs", "check_trains", "known_names"]

_FAMILIES = ("", "torchvision", "timm")
# with auxiliary classifiers these return tuples while they train
_NO_AUXILIARY = {"aux_logits": False, "init_weights": True}
_OPTIONS = {"googlenet": _NO_AUXILIARY, "inception_v3": _NO_AUXILIARY}


def build_network(name: str, num_classes: int, width: float = 1.0) -> nn.Module:
    """Build a network with random weights; nothing is ever downloaded.

    Args:
        name: one of `dcx_kernels.models`; else a classification or segmentation network of
            torchvision (``torchvision:NAME`` where both have one, as vgg16); or ``timm:NAME``.
        num_classes: outputs.
        width: factor on the channel counts, of our own networks only.

    Raises:
        ValueError: if there is no such network (the message lists near names), the library is not
            installed, or the network has no ``width``.
    """
    family, _, short = name.rpartition(":")
    if family not in _FAMILIES:
        raise ValueError(expected("torchvision:NAME or timm:NAME", repr(name)))
    if family and importlib.util.find_spec(family) is None:
        raise ValueError(f"{name!r} needs {family}: pip install {family}")
    if short not in known_names(family):
        raise ValueError(_no_such_network(name, family))
    if not family and short in MODELS:
        return build(short, num_classes, width=width)
    if width != 1.0:
        what = f"width 1 (only {', '.join(MODELS)} have another)"
        raise ValueError(expected(what, width, name))
    if num_classes < 1:
        raise ValueError(expected("num_classes of at least 1", num_classes, name))
    if family == "timm":
        make: Callable[..., nn.Module] = _import("timm").create_model
        return make(short, pretrained=False, num_classes=num_classes)
    models = _import("torchvision.models")
    options: dict[str, object] = dict(_OPTIONS.get(short, {}))
    if short in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None  # else they are downloaded
    network: nn.Module = models.get_model(short, weights=None, num_classes=num_classes, **options)
    return network


def known_names(family: str = "") -> list[str]:
    """Return the names of ``torchvision`` or ``timm``, or those that need no family before them."""
    if family == "timm":
        names: list[str] = _import("timm").list_models()
        return names
    own = [] if family else list(MODELS)
    if importlib.util.find_spec("torchvision") is None:
        return own
    models = _import("torchvision.models")
    theirs = [*models.list_models(module=models), *models.list_models(module=models.segmentation)]
    return list(dict.fromkeys(own + theirs))


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they script functions, which torch deprecates; not ours
        return importlib.import_module(name)


def _no_such_network(name: str, family: str) -> str:
    short = name.rpartition(":")[2]
    near = difflib.get_close_matches(short, known_names(family), n=5, cutoff=0.5)
    prefix = f"{family}:" if family else ""
    what = f"a model out of {', '.join(MODELS)}, or of torchvision, or timm:NAME"
    if not family and importlib.util.find_spec("torchvision") is None:
        what += " (torchvision is not installed)"
    hint = f"; near: {', '.join(prefix + n for n in near)}" if near else ""
    return expected(what, repr(name) + hint)


@torch.no_grad()
def check_runs(network: nn.Module, example: Tensor, name: str) -> object:
    """Run a network in evaluation mode on an example, and return what it returns.

    Args:
        network: any network; it is in evaluation mode afterwards.
        example: one image.
        name: of the network, for the message.

    Raises:
        ValueError: if images of this size do not fit it.
    """
    return _run(network.eval(), example, name)


@torch.no_grad()
def check_trains(network: nn.Module, example: Tensor, num_classes: int, name: str) -> None:
    """Refuse a network that cannot be trained as a classifier of such images.

    Args:
        network: any network; it is left alone.
        example: one image.
        num_classes: of the data.
        name: of the network, for the message.

    Raises:
        ValueError: if images of this size do not fit it, or it returns something else than logits.
    """
    trial = copy.deepcopy(network)
    images = example.expand(2, *example.shape[1:])  # norms refuse a single value while training
    for mode in (False, True):
        got = _run(trial.train(mode), images, name)
        if not isinstance(got, Tensor) or got.shape != (2, num_classes):
            found = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(expected(f"logits of shape (2, {num_classes})", found, name))


def _run(network: nn.Module, images: Tensor, name: str) -> object:
    try:
        return network(images)
    except (RuntimeError, AssertionError, IndexError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        size = "x".join(str(extent) for extent in images.shape[2:])
        raise ValueError(f"{name} does not run on images of {size}: {reason}") from error

"""How far a reproduction is scaled down, and the words that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dcx_kernels.data import ImageData, load
from dcx_kernels.errors import expected
from dcx_kernels.recipes.reproduce_target import Entry, Target

__all__ = ["Options", "data_sources", "image_size", "read_data", "scaled_down", "settings_for"]

# training images and classes of the papers' data sets: what has others only stands for them
_PAPERS_DATA = {
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "svhn": (604_388, 10),
    "imagenet": (1_281_167, 1000),
}
_IMAGE_SIZE = 32
_SCALES = ("epochs", "batch_size", "lr", "width", "image_size", "train_images")


@dataclass(frozen=True)
class Options:
    """What of the recipe is changed; None leaves the paper's.

    Args:
        sources: the paper's data set -> name or path of what is read for it; lines about others
            are left out.
        epochs: of every training; milestones, warm-ups and the like keep their share.
        batch_size: images per step.
        lr: learning rate at the start.
        width: factor on the channels of our own networks.
        image_size: height and width the images are scaled to.
        train_images: how many of the training images are used, the first ones.
        budget_s: seconds after which no further training is begun.
        device: where it runs.
        channels_last: memory layout.

    Raises:
        ValueError: naming the option that is out of range.
    """

    sources: Mapping[str, str]
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    width: float | None = None
    image_size: int | None = None
    train_images: int | None = None
    budget_s: float | None = None
    device: str = "cpu"
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size", "train_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                what = f"--{name.replace('_', '-')} of at least 1"
                raise ValueError(expected(what, value))
        for name in ("lr", "width", "budget_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                flag = name.removesuffix("_s")
                raise ValueError(expected(f"a positive --{flag}", value))

    def or_of(self, target: Target) -> Options:
        """Return these options, with those of the target's file where none is given.

        Raises:
            ValueError: if the file scales something else, or by a value that is out of range.
        """
        unknown = sorted(set(target.scale) - set(_SCALES))
        if unknown:
            what = f"a scale out of {', '.join(_SCALES)}"
            raise ValueError(expected(what, ", ".join(unknown), target.name))
        missing = {k: v for k, v in target.scale.items() if getattr(self, k) is None}
        return replace(self, **missing)


def data_sources(target: Target, given: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=SOURCE``, or ``SOURCE`` alone for the first data set of the target.

    Raises:
        ValueError: if nothing is given, a name is not of this target, or one is given twice.
    """
    names = target.values("data")
    found: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not name.isidentifier():  # a path may have a = in it
            name, source = names[0], text
        if name not in names:
            raise ValueError(expected(f"--data for {', '.join(names)}", repr(text), target.name))
        if name in found:
            raise ValueError(expected(f"one --data for {name}", repr(text), target.name))
        if not source:
            raise ValueError(expected(f"a data set behind {name}=", repr(text), target.name))
        found[name] = source
    if not found:
        forms = " or ".join(f"--data {name}=SOURCE" for name in names)
        raise ValueError(expected(forms, "no --data", target.name))
    return found


def settings_for(target: Target, entry: Entry, options: Options) -> dict[str, Any]:
    """Return the settings of a line, scaled down as asked."""
    settings = target.settings_for(entry)
    if options.epochs is not None:
        for name in ("decay_every", "sparse_epochs"):
            if name in settings:  # the same share of the epochs
                settings[name] = -(-settings[name] * options.epochs // settings["epochs"])
    for name in ("epochs", "batch_size", "lr"):
        value = getattr(options, name)
        if value is not None:
            settings[name] = value
    settings.pop("image_size", None)  # the data has it already
    return settings


def image_size(target: Target, options: Options) -> int:
    """Return the height and width of the images."""
    return int(options.image_size or target.settings.get("image_size", _IMAGE_SIZE))


def read_data(target: Target, options: Options) -> dict[str, ImageData]:
    """Read the data sets of a target.

    Raises:
        DataError: if one cannot be read, or has fewer training images than are asked for.
    """
    size = image_size(target, options)
    data = {name: load(source, image_size=size) for name, source in options.sources.items()}
    if options.train_images is not None:
        data = {name: images.first(options.train_images) for name, images in data.items()}
    return data


def scaled_down(target: Target, options: Options, data: Mapping[str, ImageData]) -> list[str]:
    """Say in which ways the trainings are not those of the paper; nothing if they are.

    Args:
        target: the part that was asked for.
        options: what is changed.
        data: the paper's data set -> the images that are read for it.
    """
    said = []
    for name, label in (("epochs", "epochs"), ("batch_size", "batch size"), ("lr", "lr")):
        value = getattr(options, name)
        lines = [entry for entry in target.entries if entry.data in options.sources]
        papers = sorted({target.settings_for(entry)[name] for entry in lines})
        if value is not None and papers != [value]:
            said.append(f"{label} {value:g} (paper {' or '.join(f'{p:g}' for p in papers)})")
    if options.width not in (None, 1):
        said.append(f"width x {options.width:g}")
    size, papers_size = image_size(target, options), target.settings.get("image_size", _IMAGE_SIZE)
    if size != papers_size:
        said.append(f"images of {size} pixels (paper {papers_size})")
    for name, images in data.items():
        count = len(images.train_labels)
        if _PAPERS_DATA.get(name) != (count, images.num_classes):
            said.append(f"{count} images of {images.num_classes} classes for {name}")
    seeds, lines_there = target.whole
    if len(target.seeds) < seeds:
        said.append(f"{len(target.seeds)} seed{'s' * (len(target.seeds) > 1)} ({seeds})")
    if len(target.entries) < lines_there:
        said.append(f"{len(target.entries)} of {lines_there} lines")
    return said

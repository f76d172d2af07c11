"""A folder of class folders of image files, decoded once to small uint8 arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcx_kernels.data.image_data import ImageData
from dcx_kernels.errors import DataError, expected

__all__ = ["read_folder"]

_TEST_NAMES = ("val", "test")
_TEST_FRACTION = 0.2
_MEMORY_SHARE = 0.5
"""How much of the machine's memory the decoded images may take."""

Sample = tuple[str, int]
"""Path and label."""


def read_folder(folder: Path, image_size: int | None = 32, seed: int = 0) -> ImageData:
    """Decode a folder of class folders: ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``.

    The test images are those of ``val``, or of ``test`` where there is no ``val``. Where there is
    no ``train`` either, the class folders are taken from PATH itself, and a fifth of each class is
    held out.

    Every image is scaled so that its shorter side has ``image_size`` pixels, cut to its central
    square, and kept as uint8: decoding is done once, and batches are made on the device. Training
    takes random resized crops of these squares, mirrored half of the time (the augmentation of
    ImageNet, from the small images). Whatever would fill more than half of the memory is refused
    before anything is decoded: ImageNet takes 16 GB at 64 pixels, and 193 GB at 224.

    Args:
        folder: PATH.
        image_size: height and width; None for images that are all of one size.
        seed: of the fifth that is held out.

    Raises:
        DataError: naming folder or file, and what was expected of it.
        ImportError: if torchvision is not installed.
    """
    train, test, classes = _samples(folder, seed)
    if image_size is not None:
        _check_memory(folder, len(train) + len(test), image_size)
    decoded = _decode(train, image_size), _decode(test, image_size)
    return ImageData.build(str(folder), *decoded, classes, "resized-crop-flip", None)


def _samples(folder: Path, seed: int) -> tuple[list[Sample], list[Sample], list[str]]:
    """Return training images, test images and the names of the classes."""
    if not folder.is_dir():
        raise DataError(expected("a folder of class folders", "no folder", str(folder)))
    if not (folder / "train").is_dir():
        samples, classes = _find(folder)
        return *_split(samples, classes, folder, seed), classes
    train, classes = _find(folder / "train")
    for name in _TEST_NAMES:
        if (folder / name).is_dir():
            test, others = _find(folder / name)
            if others != classes:
                apart = sorted(set(classes) ^ set(others))
                what = f"the class folders of {folder / 'train'}"
                got = f"{apart[0]!r} in one of them only"
                raise DataError(expected(what, got, str(folder / name)))
            return train, test, classes
    raise DataError(expected("a folder 'val' or 'test' beside 'train'", "neither", str(folder)))


def _find(folder: Path) -> tuple[list[Sample], list[str]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError("a folder of images needs torchvision to be installed") from error
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        what = "class folders with image files (.jpg, .png, .webp ...) in each"
        raise DataError(expected(what, error, str(folder))) from error
    return found.samples, found.classes


def _split(
    samples: Sequence[Sample], classes: Sequence[str], folder: Path, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Hold a fifth of each class out, at least one image."""
    generator = torch.Generator().manual_seed(seed)
    train: list[Sample] = []
    test: list[Sample] = []
    for label, name in enumerate(classes):
        own = [sample for sample in samples if sample[1] == label]
        if len(own) < 2:
            what = "2 images or more of a class, one of them to test on"
            raise DataError(expected(what, len(own), str(folder / name)))
        held = max(1, round(_TEST_FRACTION * len(own)))
        order = torch.randperm(len(own), generator=generator).tolist()
        test += [own[i] for i in sorted(order[:held])]
        train += [own[i] for i in sorted(order[held:])]
    return train, test


def _check_memory(folder: Path, count: int, image_size: int) -> None:
    needed = count * 3 * image_size**2
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MEMORY_SHARE * there:
        what = f"images that fill at most half of this machine's {there / 1e9:.1f} GB of memory"
        got = f"{count} of {image_size}x{image_size}, {needed / 1e9:.1f} GB"
        raise DataError(expected(f"{what} (a smaller --image-size helps)", got, str(folder)))


def _decode(samples: Sequence[Sample], image_size: int | None) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, H, W) uint8 and labels (N,), decoded by as many threads as there are."""
    first = _read(samples[0][0], image_size)
    images = torch.empty((len(samples), *first.shape), dtype=torch.uint8)

    def fill(index: int) -> None:
        path = samples[index][0]
        image = _read(path, image_size)
        if image.shape != first.shape:  # without a wanted size only
            what = f"{first.shape[2]}x{first.shape[1]} pixels as in {samples[0][0]}"
            raise DataError(expected(what, f"{image.shape[2]}x{image.shape[1]}", path))
        images[index] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets other threads run meanwhile
        for _ in pool.map(fill, range(len(samples))):
            pass
    return images, torch.tensor([label for _, label in samples])


def _read(path: str, image_size: int | None) -> Tensor:
    """Return one image as RGB, (3, H, W) uint8, scaled and cut to the central square."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if image_size is not None:  # a JPEG may be decoded at half of its size, or less
                file.draft("RGB", (2 * image_size, 2 * image_size))
            image: Any = file.convert("RGB")
    # a damaged file fails in its format's decoder, with whatever error that has
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise DataError(expected("an undamaged image file", got, path)) from error
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

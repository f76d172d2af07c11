"""Data sets in a NumPy archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcx_kernels.data.image_data import ImageData
from dcx_kernels.errors import DataError, expected

__all__ = ["read_npz"]

Array = npt.NDArray[Any]

_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(path: Path, image_size: int | None = 32) -> ImageData:
    """Read an ``.npz`` file; pickled objects in it are refused.

    Without ``classes`` there are as many as the largest training label says. Training shifts the
    images but does not mirror them: only their owner knows whether a mirrored one is still valid.

    Args:
        path: the file, see `load`.
        image_size: height and width to scale to; None keeps the file's.

    Raises:
        DataError: naming file, expectation and value.
    """
    arrays = _read_arrays(path)
    for key in _REQUIRED:
        if key not in arrays:
            raise DataError(expected(f"an array {key!r}", f"only {sorted(arrays)}", str(path)))
    train = _images(arrays, "train_images", path), _labels(arrays, "train_labels", path)
    test = _images(arrays, "test_images", path), _labels(arrays, "test_labels", path)
    for split, (images, labels) in (("train", train), ("test", test)):
        if len(images) != len(labels):
            what = f"{split}_labels for each of the {len(images)} {split}_images"
            raise DataError(expected(what, f"{len(labels)} labels", str(path)))
    if "classes" in arrays:
        classes = _classes(arrays["classes"], path)
    else:
        classes = [str(label) for label in range(max(0, int(train[1].max())) + 1)]
    for split, (_, labels) in (("train", train), ("test", test)):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(classes):
            origin = "from 'classes'" if "classes" in arrays else "from the largest training label"
            what = f"{split}_labels in [0, {len(classes)}) ({origin})"
            raise DataError(expected(what, low if low < 0 else high, str(path)))
    return ImageData.build(str(path), train, test, classes, augment="crop", image_size=image_size)


def _read_arrays(path: Path) -> dict[str, Array]:
    wanted = {*_REQUIRED, "classes"}
    try:
        # opened here: given a path, numpy leaves the file open when the archive is damaged
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(expected("an .npz archive", "a single array", str(path)))
            with archive:
                return {key: archive[key] for key in archive.files if key in wanted}
    except DataError:
        raise
    # zip directory, deflate stream and array header each have their own errors when damaged
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise DataError(
            expected("an undamaged .npz archive of plain arrays", got, str(path))
        ) from (error)


def _images(arrays: dict[str, Array], key: str, path: Path) -> Tensor:
    """Return N H W C images as (N, 3, H, W)."""
    array = arrays[key]
    if array.dtype != np.uint8:
        raise DataError(expected(f"{key} of dtype uint8", array.dtype, str(path)))
    if array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        what = f"{key} of shape (N, H, W, C) with C 1 or 3 and nothing empty"
        raise DataError(expected(what, array.shape, str(path)))
    images = torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)
    return images.expand(-1, 3, -1, -1).contiguous()


def _labels(arrays: dict[str, Array], key: str, path: Path) -> Tensor:
    array = arrays[key]
    if array.dtype.kind not in "iu":
        raise DataError(expected(f"{key} of an integer dtype", array.dtype, str(path)))
    if array.ndim != 1:
        raise DataError(expected(f"{key} of shape (N,)", array.shape, str(path)))
    return torch.from_numpy(array.astype(np.int64))


def _classes(array: Array, path: Path) -> list[str]:
    if array.dtype.kind not in "US" or array.ndim != 1 or not array.size:
        got = f"{array.dtype} of shape {array.shape}"
        raise DataError(expected("classes to be a 1-D array of strings", got, str(path)))
    return [name.decode("utf-8") if isinstance(name, bytes) else name for name in array.tolist()]

"""CIFAR-10 and CIFAR-100 in the Python format that torchvision downloads and unpacks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcx_kernels.data.image_data import ImageData
from dcx_kernels.errors import DataError, expected

__all__ = ["FOLDERS", "read_cifar"]

# folder -> training files, test file, file of names, key of labels, key of names
FOLDERS = {
    "cifar-10-batches-py": (
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar-100-python": (("train",), "test", "meta", "fine_labels", "fine_label_names"),
}
_PIXELS = 3 * 32 * 32
# all that a pickled array needs, under the names of NumPy 1 and 2; nothing here runs foreign code
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def read_cifar(folder: Path, image_size: int | None = 32) -> ImageData:
    """Read ``cifar-10-batches-py`` or ``cifar-100-python``.

    The files are pickles; they are read by an unpickler that knows arrays, lists and strings only.

    Args:
        folder: the folder itself.
        image_size: height and width to scale to; None keeps 32.

    Raises:
        DataError: naming the file that is missing, damaged or of another form.

    References:
        Learning Multiple Layers of Features from Tiny Images,
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    train_files, test_file, names_file, label_key, names_key = FOLDERS[folder.name]
    parts = [_read_batch(folder / name, label_key) for name in train_files]
    train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    test = _read_batch(folder / test_file, label_key)
    names = _read(folder / names_file).get(names_key)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        got = type(names).__name__
        raise DataError(expected(f"a list of strings {names_key!r}", got, str(folder / names_file)))
    return ImageData.build(str(folder), train, test, names, "crop-flip", image_size)


def _read_batch(path: Path, label_key: str) -> tuple[Tensor, Tensor]:
    content = _read(path)
    data: object = content.get("data")
    labels: object = content.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        got = type(data).__name__
        if isinstance(data, np.ndarray):
            got = f"{data.dtype} of shape {data.shape}"
        raise DataError(expected(f"'data', uint8 of shape (N, {_PIXELS})", got, str(path)))
    if not isinstance(labels, list) or len(labels) != len(data):
        got = f"{len(labels)} labels" if isinstance(labels, list) else type(labels).__name__
        raise DataError(expected(f"{label_key!r}, a list of {len(data)} labels", got, str(path)))
    if not all(isinstance(label, int) for label in labels):
        raise DataError(expected(f"{label_key!r} to be ints", "others", str(path)))
    images = torch.from_numpy(data.copy()).view(-1, 3, 32, 32)
    return images, torch.tensor(labels, dtype=torch.int64)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(expected(f"a file {path.name!r}", "none", str(path.parent))) from None
    # a damaged pickle can fail in any opcode, with whatever error that opcode has
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise DataError(expected("an undamaged CIFAR file", got, str(path))) from error
    if not isinstance(content, dict):
        raise DataError(expected("a dictionary", type(content).__name__, str(path)))
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of arrays and plain containers; anything else is an error, never a call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a CIFAR file")
        return super().find_class(module, name)

"""Street View House Numbers (cropped digits), in the ``.mat`` files that torchvision keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcx_kernels.data.image_data import ImageData
from dcx_kernels.errors import DataError, expected

__all__ = ["download_svhn", "read_svhn"]

_SPLITS = ("train", "extra", "test")
_SIZE = 32
_CLASSES = tuple(str(digit) for digit in range(10))


def read_svhn(folder: Path, image_size: int | None = 32, *, extra: bool = True) -> ImageData:
    """Read ``train_32x32.mat``, ``extra_32x32.mat`` and ``test_32x32.mat``.

    Training shifts and mirrors the images as Spasov and Lio do, though a mirrored digit is another
    sign.

    Args:
        folder: where the files are.
        image_size: height and width to scale to; None keeps 32.
        extra: train on the 531,131 easier images of "extra" as well, as the papers do: 604,388 in
            all, 1.9 GB in memory. False: on the 73,257 of "train".

    Raises:
        DataError: naming the file that is missing, damaged or of another form.
        ImportError: if SciPy is not installed.

    References:
        Reading Digits in Natural Images with Unsupervised Feature Learning,
        http://ufldl.stanford.edu/housenumbers; Dynamic Neural Network Channel Execution for
        Efficient Training, https://arxiv.org/abs/1905.06435, section 3.1.
    """
    splits = [split for split in _SPLITS if extra or split != "extra"]
    for path in (folder / _name(split) for split in splits):  # all, before minutes of reading
        if not path.is_file():
            hint = "; without the extra images: svhn-train:PATH" if "extra" in path.name else ""
            what = f"a file {path.name!r} (--download fetches it{hint})"
            raise DataError(expected(what, "none", str(folder)))
    parts = {split: _read(folder / _name(split)) for split in splits}
    test = parts.pop("test")
    images = torch.cat([images for images, _ in parts.values()])
    labels = torch.cat([labels for _, labels in parts.values()])
    return ImageData.build(str(folder), (images, labels), test, _CLASSES, "crop-flip", image_size)


def download_svhn(folder: Path, *, extra: bool = True) -> list[Path]:
    """Download the files that are missing; torchvision knows where from, and their checksums.

    Args:
        folder: where they go; made if it is not there.
        extra: the 1.3 GB of "extra" too.

    Returns:
        The files that were downloaded.

    Raises:
        DataError: naming the file that could not be downloaded, or arrived damaged.
        ImportError: if torchvision is not installed.
    """
    try:
        from torchvision.datasets import SVHN
        from torchvision.datasets.utils import download_url
    except ImportError as error:
        raise ImportError("to download SVHN, torchvision needs to be installed") from error
    done = []
    for split in _SPLITS:
        path = folder / _name(split)
        if path.is_file() or (split == "extra" and not extra):
            continue
        url, name, md5 = SVHN.split_list[split]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download_url(url, str(folder), name, md5)
        except (OSError, RuntimeError) as error:
            raise DataError(expected(f"to download {url}", error, str(path))) from error
        done.append(path)
    return done


def _name(split: str) -> str:
    return f"{split}_{_SIZE}x{_SIZE}.mat"


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) and labels; MATLAB's class 10 is the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("the data set SVHN needs scipy to be installed") from error
    try:
        content = loadmat(path, variable_names=("X", "y"))
    # header, compressed blocks and array tags each have their own errors when damaged
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise DataError(expected("an undamaged .mat file", got, str(path))) from error
    images = _array(content, "X", path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (_SIZE, _SIZE, 3):
        got = f"{images.dtype} of shape {images.shape}"
        raise DataError(expected("'X', uint8 of shape (32, 32, 3, N)", got, str(path)))
    labels = _array(content, "y", path).reshape(-1)
    if labels.dtype.kind not in "iu" or len(labels) != images.shape[3]:
        got = f"{len(labels)} of dtype {labels.dtype}"
        raise DataError(expected(f"'y', {images.shape[3]} integer labels", got, str(path)))
    low, high = int(labels.min(initial=1)), int(labels.max(initial=1))
    if low < 0 or high > 10:
        wrong = low if low < 0 else high
        raise DataError(expected("labels 'y' in [0, 10]", wrong, str(path)))
    digits = torch.from_numpy(labels.astype(np.int64)) % 10
    return torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1))), digits


def _array(content: dict[str, Any], key: str, path: Path) -> npt.NDArray[Any]:
    array = content.get(key)
    if not isinstance(array, np.ndarray):
        got = sorted(name for name in content if not name.startswith("__"))
        raise DataError(expected(f"an array {key!r}", f"only {got}", str(path)))
    return array

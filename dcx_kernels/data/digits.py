"""Handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import torch

from dcx_kernels.data.image_data import ImageData

__all__ = ["read_digits"]

_LEVELS = 16  # pixel values are 0..16
_TEST_FRACTION = 0.2


def read_digits(image_size: int | None = 32, seed: int = 0) -> ImageData:
    """Return the 1797 digits as RGB, split 80/20 with equal class shares.

    They are shifted but never mirrored in training: a mirrored digit is another sign.

    Args:
        image_size: height and width to scale to; None keeps 8.
        seed: of the split.

    Raises:
        ImportError: if scikit-learn is not installed.

    References:
        Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the data set 'digits' needs scikit-learn to be installed") from error
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).double() * (255 / _LEVELS)
    images = pixels.round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=_TEST_FRACTION, random_state=seed, stratify=bunch.target
    )
    return ImageData.build(
        "digits",
        (images[train], labels[train]),
        (images[test], labels[test]),
        [str(name) for name in bunch.target_names],
        augment="crop",
        image_size=image_size,
    )

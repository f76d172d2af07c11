"""The one form every data set has in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.data.augment import check_augment
from dcx_kernels.errors import DataError, expected

__all__ = ["ImageData"]

_RESIZE_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class ImageData:
    """Train and test images of one data set.

    Args:
        name: where it came from.
        train_images: (N, C, H, W) uint8.
        train_labels: (N,) int64, in [0, len(classes)).
        test_images: (M, C, H, W) uint8.
        test_labels: (M,) int64.
        classes: name of each class.
        mean: of each channel of the training images on the scale [0, 1].
        std: likewise; 1 for a channel that is constant, so that normalising it gives zeros.
        augment: the augmentation that suits these images, one of `AUGMENTATIONS`.

    Raises:
        DataError: if dtypes, shapes, lengths or labels contradict each other.
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"

    def __post_init__(self) -> None:
        check_augment(self.augment)
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            self._check_split(split, images, labels)
        a, b = tuple(self.train_images.shape[1:]), tuple(self.test_images.shape[1:])
        if a != b:
            what = f"test images of the training images' shape {a}"
            raise DataError(expected(what, b, where=self.name))

    @classmethod
    def build(
        cls,
        name: str,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        classes: Sequence[str],
        augment: str,
        image_size: int | None,
    ) -> ImageData:
        """Resize the images, if asked, and take mean and std from the training images.

        Args:
            name: where the data came from.
            train: images (N, C, H, W) uint8 and labels (N,) int64.
            test: likewise.
            classes: name of each class.
            augment: the augmentation that suits these images.
            image_size: height and width to scale to (bilinear); None leaves the images alone.

        Raises:
            DataError: if the parts contradict each other.
            ValueError: if ``image_size`` is not a positive int.
        """
        if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
            raise ValueError(expected("image_size to be None or a positive int", repr(image_size)))
        train_images, test_images = _resize(train[0], image_size), _resize(test[0], image_size)
        mean, std = _mean_and_std(train_images)
        tensors = (train_images, train[1], test_images, test[1])
        return cls(name, *tensors, tuple(classes), mean, std, augment)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, c, h, w = self.train_images.shape
        return c, h, w

    def first(self, count: int) -> ImageData:
        """Return the same data with only the first ``count`` training images, and their mean.

        Raises:
            DataError: if there are fewer.
        """
        if not 0 < count <= len(self.train_labels):
            what = f"1 to {len(self.train_labels)} training images"
            raise DataError(expected(what, count, where=self.name))
        images, labels = self.train_images[:count], self.train_labels[:count]
        mean, std = _mean_and_std(images)
        return replace(self, train_images=images, train_labels=labels, mean=mean, std=std)

    def _check_split(self, split: str, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            what = f"{split} images, uint8 of shape (N, C, H, W) with N > 0"
            raise DataError(expected(what, got, where=self.name))
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            what = f"{split} labels, int64 of shape ({len(images)},), one for each image"
            raise DataError(expected(what, got, where=self.name))
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            what = f"{split} labels in [0, {len(self.classes)})"
            raise DataError(expected(what, low if low < 0 else high, where=self.name))


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Scale (N, C, H, W) uint8 images to ``size`` x ``size``, chunk by chunk."""
    if size is None or images.dim() != 4 or images.shape[2:] == (size, size) or not images.numel():
        return images
    chunks = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for chunk in torch.split(images, _RESIZE_CHUNK)
    ]
    return torch.cat(chunks)


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel on the scale [0, 1], from exact integer counts."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        weights = counts / counts.sum()
        mean = float((weights * values).sum())
        std = float((weights * (values - mean).square()).sum().sqrt())
        means.append(mean)
        stds.append(std if int((counts > 0).sum()) > 1 else 1.0)
    return tuple(means), tuple(stds)

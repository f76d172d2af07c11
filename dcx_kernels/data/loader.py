"""Batches out of images that stay on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dcx_kernels.data.augment import augment_batch, check_augment
from dcx_kernels.data.image_data import ImageData
from dcx_kernels.errors import expected

__all__ = ["Loader", "eval_loader", "train_loader"]


class Loader:
    """Normalised batches of images that live, as uint8, on the device they are used on.

    There is no state: order and augmentation are functions of (seed, epoch, step), so that a run
    that resumes in the middle of an epoch sees exactly the batches it would have seen.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        batch_size: images of a batch.
        mean: of each channel on the scale [0, 1].
        std: of each channel on the scale [0, 1].
        augment: one of `AUGMENTATIONS`, applied before normalisation.
        seed: of order and augmentation.
        device: where images are moved to, once; None leaves them where they are.
        shuffle: a new order each epoch.
        drop_last: leave out the last batch if it is smaller (batch norm cannot train on one image).
        channels_last: memory format of the batches.
        dtype: of the batches' images.

    Raises:
        ValueError: if an argument is out of range, or not a single batch comes out.

    Shape:
        images (batch_size, C, H, W) and labels (batch_size,) int64 for each batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
        seed: int = 0,
        device: torch.device | str | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_augment(augment)
        _check_images(images, labels, mean, std)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(expected("batch_size to be a positive int", repr(batch_size)))
        if drop_last and batch_size > len(images):
            what = f"batch_size of at most the {len(images)} images there are (drop_last=True)"
            raise ValueError(expected(what, batch_size))
        if not dtype.is_floating_point:
            raise ValueError(expected("a floating dtype", dtype))
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.channels_last, self.dtype = channels_last, dtype
        # 16-bit batches are computed in float32 and rounded once
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (1, -1, 1, 1)
        self._mean = (torch.tensor(mean, dtype=torch.float64) * 255).to(wide).view(shape)
        self._std = (torch.tensor(std, dtype=torch.float64) * 255).to(wide).view(shape)
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where images, labels and batches live."""
        return self.images.device

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def order(self, epoch: int) -> Tensor:
        """Return the order of the images in ``epoch``, (N,) int64 on the CPU."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        return torch.randperm(len(self.images), generator=_generator("order", self.seed, epoch))

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of ``epoch`` from step ``start_step`` on.

        Args:
            epoch: number of the epoch; each has its own order and augmentation.
            start_step: batches to leave out, in [0, len(self)].

        Raises:
            ValueError: if ``epoch`` or ``start_step`` is out of range.
        """
        if epoch < 0:
            raise ValueError(expected("epoch of at least 0", epoch))
        if not 0 <= start_step <= len(self):
            raise ValueError(expected(f"start_step in [0, {len(self)}]", start_step))
        return self._batches(epoch, start_step)

    def _batches(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch).to(self.device)
        for step in range(start_step, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = self.images[chosen]
            if self.augment != "none":
                generator = _generator("augment", self.seed, epoch, step)
                images = augment_batch(images, self.augment, generator)
            yield self._normalise(images), self.labels[chosen]

    def _normalise(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        wide = images.to(self._mean.dtype, memory_format=layout)
        return wide.sub_(self._mean).div_(self._std).to(self.dtype)


def train_loader(
    data: ImageData,
    batch_size: int,
    *,
    augment: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    drop_last: bool = True,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Return the loader of the training images: shuffled, augmented as suits the data.

    Args:
        data: the data set.
        batch_size: images of a batch.
        augment: None for the data set's own.
        seed: of order and augmentation.
        device: where the images are moved to.
        drop_last: leave out the last batch if it is smaller.
        channels_last: memory format of the batches.
        dtype: of the batches' images.
    """
    return Loader(
        data.train_images,
        data.train_labels,
        batch_size,
        mean=data.mean,
        std=data.std,
        augment=data.augment if augment is None else augment,
        seed=seed,
        device=device,
        drop_last=drop_last,
        channels_last=channels_last,
        dtype=dtype,
    )


def eval_loader(
    data: ImageData,
    batch_size: int,
    *,
    split: str = "test",
    device: torch.device | str | None = None,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Return a loader of every image once, in order, without augmentation.

    Args:
        data: the data set.
        batch_size: images of a batch; the last may be smaller.
        split: "test" or "train".
        device: where the images are moved to.
        channels_last: memory format of the batches.
        dtype: of the batches' images.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(expected("split to be 'train' or 'test'", repr(split)))
    is_test = split == "test"
    return Loader(
        data.test_images if is_test else data.train_images,
        data.test_labels if is_test else data.train_labels,
        batch_size,
        mean=data.mean,
        std=data.std,
        device=device,
        shuffle=False,
        drop_last=False,
        channels_last=channels_last,
        dtype=dtype,
    )


def _generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator that depends on the arguments only.

    A digest rather than a sum: neighbouring seeds, epochs and steps must not share their draws.
    """
    text = "/".join([purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _check_images(
    images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]
) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(expected("uint8 images of shape (N, C, H, W) with N > 0", got))
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(expected(f"int64 labels of shape ({len(images)},)", got))
    for argument, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[1]:
            what = f"{argument} of {images.shape[1]} channels"
            raise ValueError(expected(what, tuple(values)))
    if not all(value > 0 for value in std):
        raise ValueError(expected("a positive std", tuple(std)))

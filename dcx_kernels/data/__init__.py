"""Image data sets in memory, and loaders that work where the data lives."""

from __future__ import annotations

from dcx_kernels.data.augment import AUGMENTATIONS
from dcx_kernels.data.image_data import ImageData
from dcx_kernels.data.loader import Loader, eval_loader, train_loader
from dcx_kernels.data.sources import ACCEPTED, download, load

__all__ = [
    "ACCEPTED",
    "AUGMENTATIONS",
    "ImageData",
    "Loader",
    "download",
    "eval_loader",
    "load",
    "train_loader",
]

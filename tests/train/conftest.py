"""A network and data small enough to train in a test, and a trainer over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcx_kernels.data import Loader
from dcx_kernels.graph import ChannelModel, convert
from dcx_kernels.optim import SGD
from dcx_kernels.selectors import CUCB
from dcx_kernels.train.log import Log
from dcx_kernels.train.loop import Trainer

BATCH, IMAGES = 8, 40


class TinyNet(nn.Module):
    """Three convolutions with batch norm, dropout, one linear layer; images of 8x8."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        logits: Tensor = self.fc(self.dropout(x.flatten(1)))
        return logits


def make_loader(shuffle: bool = True, images: int = IMAGES, **options: Any) -> Loader:
    """Return batches of images that depend on their label; always the same."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(images) % 5
    noise = torch.randint(0, 128, (images, 3, 8, 8), generator=generator)
    pixels = noise + 25 * labels[:, None, None, None]
    scale = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    options = {"shuffle": shuffle, "drop_last": shuffle, **scale, **options}
    return Loader(pixels.to(torch.uint8), labels, BATCH, **options)


def make_dense(seed: int = 0) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet()


def make_model(seed: int = 0, execution: str = "sparse") -> ChannelModel:
    return convert(make_dense(seed), torch.zeros(2, 3, 8, 8), execution=execution, saliency="batch")


def make_trainer(directory: Path | None = None, seed: int = 0, **options: Any) -> Trainer:
    """Return a new sparse trainer; with a directory it writes log and checkpoints there."""
    model = options.pop("model", None) or make_model(seed)
    selector = options.pop("selector", None) or CUCB(model.groups, 0.5, seed=seed)
    optimizer = SGD(model, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    torch.manual_seed(seed)
    if directory is not None:
        options = {
            "checkpoint_dir": directory / "checkpoints",
            "log": Log(directory / "log.jsonl", "sparse"),
            "config": {"model": "tiny"},
            **options,
        }
    return Trainer(model, selector, optimizer, **options)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture
def loader() -> Loader:
    return make_loader()


@pytest.fixture
def test_loader() -> Loader:
    return make_loader(shuffle=False, images=21)


@pytest.fixture
def trainer_in() -> Callable[..., Trainer]:
    return make_trainer


@pytest.fixture
def channel_model() -> Callable[..., ChannelModel]:
    return make_model


@pytest.fixture
def dense_model() -> Callable[..., TinyNet]:
    return make_dense


@pytest.fixture
def loader_of() -> Callable[..., Loader]:
    return make_loader

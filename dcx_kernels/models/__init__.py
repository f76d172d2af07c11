"""The papers' networks that torchvision lacks, as plain PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dcx_kernels.errors import expected
from dcx_kernels.models.m_cifarnet import MCifarNet, m_cifarnet
from dcx_kernels.models.resnet import CifarResNet, resnet20, resnet32, resnet56
from dcx_kernels.models.vgg import VGG, vgg16, vgg19

__all__ = [
    "MODELS",
    "VGG",
    "CifarResNet",
    "MCifarNet",
    "build",
    "m_cifarnet",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg16",
    "vgg19",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "m_cifarnet": m_cifarnet,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "vgg16": vgg16,
    "vgg19": vgg19,
}


def build(name: str, num_classes: int, **kwargs: object) -> nn.Module:
    """Build a network of `MODELS` by name.

    Args:
        name: key of `MODELS`.
        num_classes: outputs of the last linear layer.
        **kwargs: passed on to the constructor, for example ``width``.

    Raises:
        ValueError: if no model has that name; the message lists those there are.
    """
    if name not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ValueError(expected(f"a model out of {known}", repr(name)))
    return MODELS[name](num_classes=num_classes, **kwargs)

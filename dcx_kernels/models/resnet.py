"""ResNets of basic blocks for 32x32 images; dynamic channel propagation prunes the 32-layer one.

Three stages of 16, 32 and 64 channels behind a 3x3 stem; the second and the third halve the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.models._shared import check_options, init_he, scale

__all__ = ["BasicBlock", "CifarResNet", "PadShortcut", "resnet20", "resnet32", "resnet56"]

Shortcut = Literal["pad", "conv"]

_STAGES = (16, 32, 64)


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels behind those there are: a shortcut without parameters.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.

    Shape:
        x (N, C, H, W) -> (N, K, ceil(H / 2), ceil(W / 2)).

    Raises:
        ValueError: if there are fewer outputs than inputs.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            # F.pad would cut the surplus off without a word
            what = f"out_channels of at least {in_channels}"
            raise ValueError(expected(what, out_channels, "PadShortcut"))
        self.zeros = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the input subsampled and padded."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.zeros))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut.

    Convolutions have no bias: batch norm subtracts the mean right behind them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        downsample: the shortcut; the first convolution has stride 2 then. None: the input itself.

    Shape:
        x (N, C, H, W) -> (N, K, H, W); ceil(H / 2), ceil(W / 2) with ``downsample``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        stride = 1 if downsample is None else 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum."""
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = self.relu(out + identity)
        return out


class CifarResNet(nn.Module):
    """A stem, three stages of basic blocks, a global average pool and one linear layer.

    Args:
        num_blocks: blocks of each stage; the network has 6 * num_blocks + 2 layers.
        widths: channels of the three stages.
        num_classes: outputs of ``fc``.
        in_channels: channels of the images.
        shortcut: where the channels grow, "pad" (`PadShortcut`; option A, the original for CIFAR)
            or "conv" (1x1 convolution of stride 2 and batch norm; option B).

    Shape:
        x (N, in_channels, H, W) -> logits (N, num_classes), for any H and W.

    Raises:
        ValueError: if there is no block, if there are not three widths, if they shrink under "pad",
            or if the shortcut is neither.

    References:
        Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385, section 4.2
    """

    def __init__(
        self,
        num_blocks: int,
        widths: Sequence[int] = _STAGES,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Shortcut = "pad",
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(expected("num_blocks of at least 1", num_blocks, "CifarResNet"))
        if shortcut not in ("pad", "conv"):
            raise ValueError(expected("shortcut 'pad' or 'conv'", repr(shortcut), "CifarResNet"))
        if len(widths) != len(_STAGES):
            raise ValueError(expected(f"{len(_STAGES)} widths", len(widths), "CifarResNet"))
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(num_blocks, first, first, None)
        self.layer2 = _stage(num_blocks, first, second, _shortcut(shortcut, first, second))
        self.layer3 = _stage(num_blocks, second, third, _shortcut(shortcut, second, third))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw He-normal convolutions; batch norm is 1 and 0, the linear layer small normal."""
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet20(
    num_classes: int = 10, width: float = 1.0, in_channels: int = 3, shortcut: Shortcut = "pad"
) -> CifarResNet:
    """Build the 20-layer network, 3 blocks a stage: 0.27 million parameters. See `resnet32`."""
    return _resnet("resnet20", 3, num_classes, width, in_channels, shortcut)


def resnet32(
    num_classes: int = 10, width: float = 1.0, in_channels: int = 3, shortcut: Shortcut = "pad"
) -> CifarResNet:
    """Build ResNet-32 of dynamic channel propagation: 5 blocks a stage.

    With 10 classes and ``width=1`` it has 464,154 parameters and 6.9e7 multiply-accumulates an
    image of 32x32. That paper does not name its shortcut; its code uses "conv": 466,906 parameters.

    Args:
        num_classes: outputs of the linear layer.
        width: factor on every channel count, rounded, at least one channel.
        in_channels: channels of the images.
        shortcut: "pad" or "conv", see `CifarResNet`.

    Raises:
        ValueError: if a number is not positive or the shortcut is neither.

    References:
        Learning to Prune in Training via Dynamic Channel Propagation,
        https://arxiv.org/abs/2007.01486, section IV
    """
    return _resnet("resnet32", 5, num_classes, width, in_channels, shortcut)


def resnet56(
    num_classes: int = 10, width: float = 1.0, in_channels: int = 3, shortcut: Shortcut = "pad"
) -> CifarResNet:
    """Build the 56-layer network, 9 blocks a stage: 0.85 million parameters. See `resnet32`."""
    return _resnet("resnet56", 9, num_classes, width, in_channels, shortcut)


def _resnet(
    name: str, num_blocks: int, num_classes: int, width: float, in_channels: int, shortcut: Shortcut
) -> CifarResNet:
    check_options(name, num_classes, width, in_channels)
    return CifarResNet(num_blocks, scale(_STAGES, width), num_classes, in_channels, shortcut)


def _stage(
    num_blocks: int, in_channels: int, out_channels: int, downsample: nn.Module | None
) -> nn.Sequential:
    blocks = [BasicBlock(in_channels, out_channels, downsample)]
    blocks += [BasicBlock(out_channels, out_channels) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int) -> nn.Module:
    if kind == "pad":
        return PadShortcut(in_channels, out_channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels)
    )

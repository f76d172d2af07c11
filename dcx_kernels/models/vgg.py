"""VGG with batch norm for 32x32 images, as the channel selection papers train it.

The networks of Simonyan and Zisserman with batch norm behind every convolution, five max pools that
end at 1x1, and a single linear layer instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dcx_kernels.models._shared import check_options, init_he, scale

__all__ = ["VGG", "vgg16", "vgg19"]

# convolutions of each stage; a 2x2 max pool ends a stage
_STAGES = (64, 128, 256, 512, 512)
_DEPTHS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """A stack of conv-BN-ReLU stages with one linear layer.

    Convolutions have no bias: batch norm subtracts the mean right behind them, so that a bias would
    be a parameter without any effect.

    Args:
        stages: output channels of the convolutions, one sequence a stage; a max pool ends each.
        num_classes: outputs of ``classifier``.

    Shape:
        x (N, 3, 32, 32) -> logits (N, num_classes). Extents from 32 to 63 work as well: what
        counts is that five halvings end at 1x1.

    References:
        Very Deep Convolutional Networks for Large-Scale Image Recognition,
        https://arxiv.org/abs/1409.1556
    """

    def __init__(self, stages: Sequence[Sequence[int]], num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_in = 3
        for stage in stages:
            for num_out in stage:
                layers.append(nn.Conv2d(num_in, num_out, 3, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(num_out))
                layers.append(nn.ReLU(inplace=True))
                num_in = num_out
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(num_in, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw He-normal convolutions; batch norm is 1 and 0, the linear layer small normal."""
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def vgg19(num_classes: int = 10, width: float = 1.0) -> VGG:
    """Build VGG-19 of dynamic channel execution: 16 convolutions, 5504 channels.

    With 10 classes and ``width=1`` it has 20,035,018 parameters and 3.98e8 multiply-accumulates an
    image, as that paper counts.

    Args:
        num_classes: outputs of the linear layer.
        width: factor on every channel count, rounded, at least one channel.

    Raises:
        ValueError: if ``num_classes`` or ``width`` is not positive.

    References:
        Dynamic Neural Network Channel Execution for Efficient Training,
        https://arxiv.org/abs/1905.06435, section 3
    """
    return _vgg("vgg19", num_classes, width)


def vgg16(num_classes: int = 10, width: float = 1.0) -> VGG:
    """Build VGG-16 of dynamic channel propagation: 13 convolutions, 4224 channels.

    The paper leaves the convolutions' bias open; they have none here (see `VGG`): 14,724,042
    parameters with 10 classes and ``width=1``.

    Args:
        num_classes: outputs of the linear layer.
        width: factor on every channel count, rounded, at least one channel.

    Raises:
        ValueError: if ``num_classes`` or ``width`` is not positive.

    References:
        Learning to Prune in Training via Dynamic Channel Propagation,
        https://arxiv.org/abs/2007.01486, section IV
    """
    return _vgg("vgg16", num_classes, width)


def _vgg(name: str, num_classes: int, width: float) -> VGG:
    check_options(name, num_classes, width)
    widths = scale(_STAGES, width)
    return VGG([[w] * n for w, n in zip(widths, _DEPTHS[name], strict=True)], num_classes)

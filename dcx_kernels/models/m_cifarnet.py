"""M-CifarNet, the eight convolutions on which feature boosting and suppression is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.models._shared import check_options, init_he, scale

__all__ = ["MCifarNet", "m_cifarnet"]

Padding = Literal["symmetric", "same"]

_WIDTHS = (64, 64, 128, 128, 128, 192, 192, 192)
_STRIDED = (2, 5)
_DROPOUT_BEHIND = (3, 6)


class MCifarNet(nn.Module):
    """Eight 3x3 convolutions with batch norm and ReLU, a global average pool, one linear layer.

    The first convolution has no padding; the third and the sixth have stride 2. Convolutions have
    no bias: batch norm brings one. Layers are called as in the paper, conv0 to conv7.

    Args:
        widths: channels of the convolutions.
        num_classes: outputs of ``classifier``.
        in_channels: channels of the images.
        padding: of stride 2. "symmetric": one pixel on each side. "same": as TensorFlow pads, which
            the published code runs on: nothing above and left of an even image. On 32x32 that is
            conv2 alone (30x30); conv5 (15x15) is the same either way.
        dropout: probability behind conv3 and conv6; 0.5 in the published code, not in the paper.

    Shape:
        x (N, in_channels, 32, 32) -> logits (N, num_classes). Other extents work as well, but are
        "same" only in multiples of 4.

    Raises:
        ValueError: if there are not eight widths, the padding is neither, or the probability is
            outside [0, 1).

    References:
        Dynamic Channel Pruning: Feature Boosting and Suppression,
        https://arxiv.org/abs/1810.05331, appendix A, Table 4
    """

    def __init__(
        self,
        widths: Sequence[int] = _WIDTHS,
        num_classes: int = 10,
        in_channels: int = 3,
        padding: Padding = "symmetric",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != len(_WIDTHS):
            raise ValueError(expected(f"{len(_WIDTHS)} widths", len(widths), "MCifarNet"))
        if padding not in ("symmetric", "same"):
            raise ValueError(expected("padding 'symmetric' or 'same'", repr(padding), "MCifarNet"))
        if not 0 <= dropout < 1:
            raise ValueError(expected("dropout in [0, 1)", dropout, "MCifarNet"))
        # names instead of numbers: both options leave the state dict's keys as they are
        self.features = nn.Sequential()
        num_in = in_channels
        for i, num_out in enumerate(widths):
            pad, stride = int(i > 0), 1 + (i in _STRIDED)
            if i == _STRIDED[0] and padding == "same":
                self.features.add_module(f"pad{i}", nn.ZeroPad2d((0, 1, 0, 1)))
                pad = 0
            conv = nn.Conv2d(num_in, num_out, 3, stride, pad, bias=False)
            self.features.add_module(f"conv{i}", conv)
            self.features.add_module(f"norm{i}", nn.BatchNorm2d(num_out))
            self.features.add_module(f"relu{i}", nn.ReLU(inplace=True))
            if dropout and i in _DROPOUT_BEHIND:
                self.features.add_module(f"dropout{i}", nn.Dropout(dropout))
            num_in = num_out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_in, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw He-normal convolutions; batch norm is 1 and 0, the linear layer small normal."""
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def m_cifarnet(
    num_classes: int = 10,
    width: float = 1.0,
    in_channels: int = 3,
    padding: Padding = "symmetric",
    dropout: float = 0.0,
) -> MCifarNet:
    """Build M-CifarNet of feature boosting and suppression: 8 convolutions, 1088 channels.

    With 10 classes and ``width=1`` it has 1,296,074 parameters and 1.743e8 multiply-accumulates an
    image, as that paper counts.

    Args:
        num_classes: outputs of the linear layer.
        width: factor on every channel count, rounded, at least one channel.
        in_channels: channels of the images.
        padding: of stride 2, "symmetric" or "same", see `MCifarNet`.
        dropout: probability behind conv3 and conv6.

    Raises:
        ValueError: if a number is out of its range or the padding is neither.

    References:
        Dynamic Channel Pruning: Feature Boosting and Suppression,
        https://arxiv.org/abs/1810.05331, appendix A
    """
    check_options("m_cifarnet", num_classes, width, in_channels)
    return MCifarNet(scale(_WIDTHS, width), num_classes, in_channels, padding, dropout)

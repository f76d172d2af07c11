"""What every network here does alike: checking its options, scaling its widths, He init."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dcx_kernels.errors import expected

__all__ = ["check_options", "init_he", "scale"]


def check_options(name: str, num_classes: int, width: float, in_channels: int = 3) -> None:
    """Refuse sizes that make no network.

    Args:
        name: of the network, for the message.
        num_classes: outputs of the last linear layer.
        width: factor on every channel count.
        in_channels: channels of the images.

    Raises:
        ValueError: if one of them is not positive.
    """
    if num_classes < 1:
        raise ValueError(expected("num_classes of at least 1", num_classes, name))
    if not width > 0:
        raise ValueError(expected("a positive width", width, name))
    if in_channels < 1:
        raise ValueError(expected("in_channels of at least 1", in_channels, name))


def scale(channels: Iterable[int], width: float) -> list[int]:
    """Return channel counts times ``width``, rounded, at least one each."""
    return [max(1, round(count * width)) for count in channels]


def init_he(network: nn.Module) -> None:
    """Draw He-normal convolutions; batch norm is 1 and 0, linear layers small normal.

    References:
        Delving Deep into Rectifiers, https://arxiv.org/abs/1502.01852
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

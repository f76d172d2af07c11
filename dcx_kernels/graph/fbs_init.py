"""A gated convolution out of a trained convolution and its batch norm."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from dcx_kernels.nn.gated_conv import GatedConv2d

__all__ = ["Init", "gate_conv"]

Init = Literal["paper", "fold"]


@torch.no_grad()
def gate_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d, init: Init, **options: Any) -> GatedConv2d:
    """Return a gated convolution that starts from trained layers.

    Args:
        conv: with or without a bias, which the norm takes away again.
        norm: its batch norm, with running statistics.
        init: ``paper`` copies filters, beta and statistics and drops gamma: rho is 1 and phi is
            drawn (He). ``fold`` is the same function at density 1: gamma's magnitude is the gate
            (rho, with phi = 0), its sign goes into the filter.
        options: of `GatedConv2d`.
    """
    new = GatedConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        conv.dilation, eps=norm.eps, momentum=norm.momentum, device=conv.weight.device,  # type: ignore[arg-type]
        dtype=conv.weight.dtype, **options,
    )  # fmt: skip
    mean, var, old = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and var is not None and old is not None
    assert new.norm.running_mean is not None and new.norm.running_var is not None
    assert new.norm.num_batches_tracked is not None
    mean = mean if conv.bias is None else mean - conv.bias
    weight = conv.weight
    if norm.bias is not None:
        new.beta.copy_(norm.bias)
    if init == "fold":
        gamma = torch.ones_like(new.rho) if norm.weight is None else norm.weight
        # a channel with gamma = 0 is beta everywhere: a filter of zeros behind an open gate
        dead = gamma == 0
        sign, size = gamma.sign(), torch.where(dead, 1, gamma.abs())
        weight, mean = weight * sign[:, None, None, None], mean * sign
        new.rho.copy_(size)
        new.phi.zero_()
        if new.beta_at == "inside":
            new.beta.div_(size)
    new.weight.copy_(weight)
    new.norm.running_mean.copy_(mean)
    new.norm.running_var.copy_(var)
    new.norm.num_batches_tracked.copy_(old)
    new.requires_grad_(conv.weight.requires_grad)
    return new.train(norm.training)

"""What a gated convolution is made of: how channels are summed up, and statistics of winners."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dcx_kernels.nn.gated_conv_channels import SampleChannels

__all__ = ["SUBSAMPLE", "Subsample", "active_norm", "subsample", "winners_of"]

Subsample = Literal["l1", "l2", "linf", "variance"]


def _mean_abs(values: Tensor, nonnegative: bool) -> Tensor:
    return (values if nonnegative else values.abs()).mean((2, 3))


SUBSAMPLE: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "l1": _mean_abs,
    # torch.linalg.vector_norm has a finite gradient at zero, the root of a mean has none
    "l2": lambda x, _: torch.linalg.vector_norm(x, 2, (2, 3)) / (x.shape[2] * x.shape[3]) ** 0.5,
    "linf": lambda x, _: torch.linalg.vector_norm(x, torch.inf, (2, 3)),
    "variance": lambda x, _: (x - x.mean((2, 3), keepdim=True)).square().mean((2, 3)),
}


def subsample(x: SampleChannels, kind: Subsample) -> Tensor:
    """Sum every channel up in one number: s of eq. 7, (N, C); absent channels are 0.

    ``l1`` is the mean of |x|, the paper's choice. Of ``l2`` and ``linf`` eq. 7 takes the HW-th part
    too; ours are the root mean square and the maximum, so that no gate depends on the image's size.
    """
    s = SUBSAMPLE[kind](x.values, x.nonnegative)
    if x.idx is None:
        return s
    return s.new_zeros((s.shape[0], x.num_channels)).scatter(1, x.idx, s)


def winners_of(density: float, channels: int) -> int:
    """Return k = ceil(density * channels); 0.3 * 10 is 3, whatever its last bit says."""
    return max(1, math.ceil(density * channels - 1e-9))


def active_norm(z: Tensor, idx: Tensor, active: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Normalise z by the mean and variance of each channel over its active samples alone.

    Running statistics move for channels with an active sample; all others rest.

    Args:
        z: compact output of the convolution.
        idx: its channels.
        active: which of them count: a winner whose gate is 0 does not.
        norm: holds running statistics, momentum and eps.

    Shape:
        z (N, k, P, Q), idx and active (N, k) -> (N, k, P, Q).
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    values, weights, flat = z.to(wide), active.to(wide), idx.flatten()
    zeros = torch.zeros(norm.num_features, dtype=wide, device=z.device)

    def over_active(each: Tensor) -> Tensor:  # (N, k) -> (K,)
        return zeros.index_add(0, flat, (each * weights).flatten())

    count = over_active(torch.ones_like(weights)) * (z.shape[2] * z.shape[3])
    least_one = count.clamp(min=1)
    mean = over_active(values.sum((2, 3))) / least_one
    centred = values - mean[idx][:, :, None, None]
    var = over_active(centred.square().sum((2, 3))) / least_one
    _move(norm, mean.detach(), var.detach(), count)
    return (centred * (var + norm.eps).rsqrt()[idx][:, :, None, None]).to(z.dtype)


@torch.no_grad()
def _move(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move running statistics as batch norm does, of the channels with a count."""
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    step = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
    unbiased = var * count / (count - 1).clamp(min=1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        moved = running + step * (new.to(running.dtype) - running)
        running.copy_(torch.where(count > 0, moved, running))

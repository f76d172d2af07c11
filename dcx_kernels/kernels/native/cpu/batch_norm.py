"""Batch norm (+ ReLU): one pass for the sums, one for the result, forward and backward.

In evaluation it is the reference's: there the outputs of a network in which all channels are active
are those of the dense one to the last bit.

NCHW and NHWC, also of tensors that are the first channels of a wider buffer: results then lie at
the head of such a buffer of their own, with zeros in its other channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import batch_norm as reference

__all__ = ["channel_batch_norm_bwd", "channel_batch_norm_fwd"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_native = torch.ops.dcx_native  # its operators are there once the library is loaded


def channel_batch_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise compact x (N, k, ...); see the reference.

    Returns:
        y with the strides of x, and the mean and inverse standard deviation used, (k,) each.
    """
    args = (weight, bias, running_mean, running_var, active, training, momentum, eps, relu)
    known = training and _knows(x, weight, bias)
    if not known or not _know_running(x, running_mean, running_var):
        return reference.channel_batch_norm_fwd(x, *args)
    out: tuple[Tensor, Tensor, Tensor] = _native.batch_norm_fwd.default(x, *args)
    return out


def channel_batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `channel_batch_norm_fwd`; see the reference.

    Returns:
        dx with the strides of x; dweight, dbias (k,) and the saliency (k,) or (N, k) in the dtype
        of ``mean``.
    """
    known = training and _knows(x, weight, bias)
    if not known or dy.dtype != x.dtype or mean.dtype != _statistics(x):
        return reference.channel_batch_norm_bwd(
            dy, x, y, weight, bias, mean, invstd, training, eps, per_sample
        )
    out: tuple[Tensor, Tensor, Tensor, Tensor]
    out = _native.batch_norm_bwd.default(dy, x, y, weight, bias, mean, invstd, training, per_sample)
    return out


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _knows(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if x.dtype not in _DTYPES or not x.numel():
        return False
    dtypes = (x.dtype, _statistics(x))
    return all(
        vector is None or (vector.dtype in dtypes and vector.is_contiguous())
        for vector in (weight, bias)
    )


def _know_running(x: Tensor, mean: Tensor | None, var: Tensor | None) -> bool:
    if mean is None or var is None:
        return mean is var
    wanted = _statistics(x)
    same = mean.dtype == wanted and var.dtype == wanted
    return same and mean.is_contiguous() and var.is_contiguous()

"""Batch norm (+ ReLU) on a GPU: one pass for the statistics, one that normalises; backward one
that sums for both vectors and the saliency, and one that differentiates.

Backward does not read the output: its sign is recomputed from x, which both passes read anyway.
Kernels take dense tensors, pixels or channels innermost, at multiples of 16 bytes; what is not so
is copied first.

Legend: N batch, K channels (``k`` active).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import batch_norm as reference

__all__ = ["channel_batch_norm_bwd", "channel_batch_norm_fwd"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_MOST = 2**28  # numbers of a sample: kernels count columns in 32 bits


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
        y, and the mean and inverse standard deviation used, (k,) float32 each.
    """
    args = (weight, bias, running_mean, running_var, active, training, momentum, eps, relu)
    if not _knows(x, weight, bias) or not _know_running(running_mean, running_var):
        return reference.channel_batch_norm_fwd(x, *args)
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.dcx_native.batch_norm_fwd(_dense(x), *args)
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

    Args:
        y: the output if ReLU was fused, else None; its values are not read.

    Returns:
        dx; dweight, dbias (k,) and the saliency (k,) or (N, k), float32.
    """
    known = _knows(x, weight, bias) and dy.dtype is x.dtype
    if not known or any(vector.dtype is not torch.float32 for vector in (mean, invstd)):
        return reference.channel_batch_norm_bwd(
            dy, x, y, weight, bias, mean, invstd, training, eps, per_sample
        )
    x = _dense(x)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.dcx_native.batch_norm_bwd(
        _in_order_of(x, dy), x, y, weight, bias, mean, invstd, training, per_sample
    )
    return out


def _knows(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if x.dtype not in _DTYPES or not 0 < x.numel() < _MOST * x.shape[0]:
        return False
    return all(
        vector is None or (vector.dtype in _DTYPES and vector.is_contiguous())
        for vector in (weight, bias)
    )


def _know_running(mean: Tensor | None, var: Tensor | None) -> bool:
    if mean is None or var is None:
        return mean is var
    alike = mean.dtype is var.dtype and mean.dtype in _DTYPES
    return alike and mean.is_contiguous() and var.is_contiguous()


def _last(x: Tensor) -> torch.memory_format:
    """Return channels innermost, as far as torch has a name for it in so many dimensions."""
    return _LAST.get(x.dim(), torch.contiguous_format)


def _dense(x: Tensor) -> Tensor:
    """Return x, or a dense copy in its order."""
    if not x.is_contiguous() and not x.is_contiguous(memory_format=_last(x)):
        x = x.contiguous(memory_format=_last(x) if x.stride(1) == 1 else torch.contiguous_format)
    return _aligned(x)


def _in_order_of(x: Tensor, t: Tensor) -> Tensor:
    """Return t, or a dense copy of it in the order of x."""
    order = torch.contiguous_format if x.is_contiguous() else _last(x)
    return _aligned(t.contiguous(memory_format=order))


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()

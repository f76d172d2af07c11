"""A whole convolution with a gate in evaluation: one call, for at one image calls are the cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import gated_convolution as reference

__all__ = ["gated_conv2d", "gates"]


def gated_conv2d(
    x: Tensor,
    in_idx: Tensor | None,
    weight: Tensor,
    phi: Tensor,
    rho: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    k: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y (N, k, P, Q) of the k winners of the gate, their channels (None: all) and g (N, K).

    See the reference; of phi and the weight, only existing channels' columns are read.
    """
    vectors, window = (rho, beta, mean, var), (stride, padding, dilation)
    if not _knows(x, in_idx, weight, phi, *vectors):
        return reference.gated_conv2d(x, in_idx, weight, phi, *vectors, eps, k, *window, relu)
    y, idx, g = torch.ops.dcx_native.gated_conv2d.default(
        x, in_idx, weight, phi, *vectors, eps, k, *window, relu
    )
    return y, idx if k < weight.shape[0] else None, g


def gates(x: Tensor) -> bool:
    """Tell whether one call beats its parts: else the reference's composition would run."""
    return x.dtype in (torch.float32, torch.float64) and x.is_contiguous()


def _knows(x: Tensor, in_idx: Tensor | None, *parameters: Tensor) -> bool:
    """Tell whether native code serves these: float32 or float64, all alike, rows as they come."""
    if not gates(x) or not (in_idx is None or in_idx.is_contiguous()):
        return False
    dtype, (weight, *others) = x.dtype, parameters
    if weight.dtype != dtype:
        return False
    for p in others:  # noqa: SIM110 - a generator takes longer than all that it asks
        if p.dtype != dtype or not p.is_contiguous():
            return False
    return True

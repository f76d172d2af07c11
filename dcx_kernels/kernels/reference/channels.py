"""Moving channels of activations: between dense tensors and compact ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.layout import layout

__all__ = ["gather", "scatter"]


def gather(x: Tensor, active: Tensor, dim: int) -> Tensor:
    """Copy the channels ``active`` (k,) of x along ``dim``; along dim 1 the layout stays."""
    if dim % x.dim() == 1 and layout(x) == torch.channels_last:  # index_select would lose it
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(1, active)
        return rows.view(n, h, w, active.shape[0]).permute(0, 3, 1, 2)
    return x.index_select(dim, active)


def scatter(x: Tensor, active: Tensor, dim: int, size: int) -> Tensor:
    """Place the channels of x among ``size`` along ``dim``, zeros between; the layout stays."""
    shape = list(x.shape)
    shape[dim] = size
    dense = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    return dense.zero_().index_copy_(dim, active, x)

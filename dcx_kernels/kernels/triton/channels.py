"""Moving channels of activations by the kernel of sums; along other axes ATen does as well."""

from __future__ import annotations

from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton import union

__all__ = ["gather", "scatter"]


def gather(x: Tensor, active: Tensor, dim: int) -> Tensor:
    """See `dcx_kernels.kernels.reference`."""
    if dim % x.dim() != 1:
        return reference.gather(x, active, dim)
    return union.gather(x, active)


def scatter(x: Tensor, active: Tensor, dim: int, size: int) -> Tensor:
    """See `dcx_kernels.kernels.reference`."""
    if dim % x.dim() != 1:
        return reference.scatter(x, active, dim, size)
    return union.scatter(x, active, size)

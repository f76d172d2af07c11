"""The sum of two compact tensors over the union of their channels: a residual add.

Legend: N batch, ``a``, ``b`` active channels of the terms, ``u`` of the sum (a channel exists
in the sum where it exists in a term).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcx_kernels.kernels import backend
from dcx_kernels.kernels.layout import layout
from dcx_kernels.ops._library import register
from dcx_kernels.ops.gather import gather

__all__ = ["UnionAddFunction", "union_add"]


def _union_add(a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int) -> Tensor:
    y: Tensor = backend.choose(a.device).union_add(a, b, a_idx, b_idx, num_out)
    return y


def _union_add_fake(a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int) -> Tensor:
    shape = (a.shape[0], num_out, *a.shape[2:])
    dtype = torch.promote_types(a.dtype, b.dtype)
    last = torch.channels_last in (layout(a), layout(b))
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=a.device, memory_format=form)


channel_union_add = register(
    "channel_union_add(Tensor a, Tensor b, Tensor a_idx, Tensor b_idx, SymInt num_out) -> Tensor",
    _union_add,
    _union_add_fake,
)


class UnionAddFunction(torch.autograd.Function):
    """Each term receives the gradients of its own channels."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int
    ) -> Tensor:
        ctx.save_for_backward(a_idx, b_idx)
        ctx.dtypes = a.dtype, b.dtype
        y: Tensor = channel_union_add(a, b, a_idx, b_idx, num_out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for needed, idx, dtype in zip(
            ctx.needs_input_grad, ctx.saved_tensors, ctx.dtypes, strict=False
        ):
            grads.append(gather(dy, idx, 1).to(dtype) if needed else None)
        return *grads, None, None, None


def union_add(a: Tensor, b: Tensor, a_idx: Tensor, b_idx: Tensor, num_out: int) -> Tensor:
    """Add two compact tensors; a channel that only one of them has is copied.

    Equivalent to: zeros (N, num_out, ...), then ``y[:, a_idx] += a; y[:, b_idx] += b``.

    Args:
        a, b: the terms; they may have different dtypes.
        a_idx, b_idx: place of each of their channels among those of the sum, sorted unique int64;
            together they cover all of them.
        num_out: channels of the sum.

    Shape:
        (N, a, ...), (N, b, ...) -> (N, num_out, ...).

    References:
        Sums whose channels are the union of both terms': FBS (Gao et al., 2019), per sample.
    """
    y: Tensor = UnionAddFunction.apply(a, b, a_idx, b_idx, num_out)
    return y

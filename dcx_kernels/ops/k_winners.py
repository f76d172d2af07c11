"""The winners of each sample: which channels a per-sample gate lets through.

Legend: N batch, C channels, k winners of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcx_kernels.channel_set import known
from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.ops._direct import direct
from dcx_kernels.ops._library import register

__all__ = ["KWinnersFunction", "k_winners"]


def _k_winners(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    winners: tuple[Tensor, Tensor] = backend.choose(g.device).k_winners(g, k)
    return winners


def _k_winners_fake(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (g.shape[0], k)
    return g.new_empty(shape, dtype=torch.int64), g.new_empty(shape)


sample_k_winners = register(
    "k_winners(Tensor g, SymInt k) -> (Tensor indices, Tensor values)", _k_winners, _k_winners_fake
)


class KWinnersFunction(torch.autograd.Function):
    """The gradient of a value goes to its winner, losers get zero."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
        indices, values = sample_k_winners(g, k)
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        ctx.channels = g.shape[1]
        return indices, values

    @staticmethod
    def backward(ctx: Any, _: Tensor, dvalues: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        dg = dvalues.new_zeros((indices.shape[0], ctx.channels))
        return dg.scatter(1, indices, dvalues), None


def k_winners(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k channels with the greatest g, for each sample its own.

    Exactly k of them: ties go to the lower channel, and NaN counts as -inf. So a winner may have
    g = 0, where fewer than k are positive; whoever computes with winners may skip it.

    Args:
        g: what the gate thinks of each channel of each sample.
        k: winners of each sample.

    Returns:
        ``indices``: the winners in ascending order. ``values``: g there. The gradient of ``values``
        reaches g at the winners only.

    Raises:
        ValueError: if g is not 2-D floating, or k is not in [1, C].

    Shape:
        g: (N, C) -> (N, k) int64, (N, k) of g's dtype.

    References:
        Dynamic Channel Pruning: Feature Boosting and Suppression (Gao et al., 2019), eq. 5-8.
    """
    if g.dim() != 2 or not g.is_floating_point():
        raise ValueError(expected("2-D floating g", f"{g.dtype} of shape {tuple(g.shape)}"))
    if not (known(k >= 1) and known(k <= g.shape[1])):
        raise ValueError(expected(f"k in [1, {g.shape[1]}]", k))
    if direct(g):
        return _k_winners(g, k)
    winners: tuple[Tensor, Tensor] = KWinnersFunction.apply(g, k)
    return winners

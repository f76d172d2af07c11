"""A whole convolution with a gate in evaluation: which channels win, and what comes of them.

Legend: N batch, K out and C in channels (``k``, ``c``: those a sample has), H W input, P Q output,
R S filter.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019.
    https://arxiv.org/abs/1810.05331
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.kernels.reference.gate import k_winners
from dcx_kernels.kernels.reference.sample_convolution import sample_conv2d_fwd

__all__ = ["gated_conv2d"]


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
    """Return g / std (conv(x) + beta std - mean) of the k winners of g, with a ReLU or not.

    That is eq. 5 with beta inside; g = ReLU(s phi + rho), s the means of |x|, is eq. 8.

    Args:
        x: compact; channel j of sample n is channel ``in_idx[n, j]`` (None: dense).
        weight, phi, rho, beta: full parameters.
        mean, var: running statistics; std is the root of var + eps.

    Returns:
        y compact, its channels (None if k is K: all) and g.

    Shape:
        x (N, c, H, W), in_idx (N, c) int64, weight (K, C, R, S), phi (K, C), others (K,) ->
        (N, k, P, Q), (N, k) int64, (N, K).
    """
    s = x.abs().mean((2, 3))
    if in_idx is not None:
        s = s.new_zeros((s.shape[0], weight.shape[1])).scatter(1, in_idx, s)
    g = F.linear(s, phi, rho).relu()
    idx, pi = (None, g) if k == weight.shape[0] else k_winners(g, k)
    std = (var + eps).sqrt()
    factor = pi / (std if idx is None else std[idx])
    y = sample_conv2d_fwd(
        x, weight, beta * std - mean, in_idx, idx, list(stride), list(padding), list(dilation)
    )
    return (y.relu() if relu else y) * factor[:, :, None, None], idx, g

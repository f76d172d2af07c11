"""Feature boosting and suppression in plain torch: dense, masked, one sample at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["gated_oracle", "odd_case"]

_SUMMARIES = {
    "l1": lambda x: x.abs().mean((2, 3)),
    "l2": lambda x: x.square().mean((2, 3)).sqrt(),
    "linf": lambda x: x.abs().amax((2, 3)),
    "variance": lambda x: (x - x.mean((2, 3), keepdim=True)).square().mean((2, 3)),
}


def gated_oracle(
    x: Tensor,
    p: dict[str, Tensor],
    winners: int,
    *,
    training: bool,
    subsample: str = "l1",
    beta_at: str = "inside",
    stats: str = "batch",
    relu: bool = True,
    eps: float = 1e-5,
    window: tuple[object, ...] = (1, 0, 1),
) -> tuple[Tensor, Tensor]:
    """Return the dense output and the 0/1 mask of winners, from equations 5 to 8 alone.

    ``p``: weight, phi, rho, beta, mean, var.
    """
    g = torch.relu(_SUMMARIES[subsample](x) @ p["phi"].t() + p["rho"])
    mask = torch.zeros_like(g)
    for n, row in enumerate(g.detach().tolist()):
        # greatest first; of equals the lower channel
        for c in sorted(range(len(row)), key=lambda c: (-row[c], c))[:winners]:
            mask[n, c] = 1
    z = F.conv2d(x, p["weight"], None, *window)
    columns = []
    for c in range(z.shape[1]):
        who = torch.ones(len(z), dtype=torch.bool)
        if stats == "active":
            who = (mask[:, c] > 0) & (g[:, c].detach() > 0)
        mean, var = p["mean"][c], p["var"][c]
        if training:
            some = z[who, c]
            mean = some.mean() if len(some) else torch.zeros((), dtype=z.dtype)
            var = (some - mean).square().mean() if len(some) else torch.zeros((), dtype=z.dtype)
        columns.append((z[:, c] - mean) / torch.sqrt(var + eps))
    h = torch.stack(columns, 1)
    pi = (g * mask)[:, :, None, None]
    beta = p["beta"][:, None, None]
    y = pi * (h + beta) if beta_at == "inside" else pi * h + beta * (pi > 0)
    return (y.relu() if relu else y), mask


def odd_case(layer: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Give a layer's parameters and statistics odd values, and return them by the oracle's names.

    Gates are positive, zero and tied.
    """
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
        layer.phi[[0, -1]] = 0  # a tie to the last bit, in whatever order products are summed
        layer.rho[[0, -1]] = scale
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
    named = dict(layer.named_parameters())
    return {**named, "mean": layer.norm.running_mean, "var": layer.norm.running_var}

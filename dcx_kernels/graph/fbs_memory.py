"""What one image reads, writes and computes in a network with gates: Table 3, and MACs of Table 4.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", Tables 3 and 4
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcx_kernels.errors import expected
from dcx_kernels.graph.fbs import FBSModel
from dcx_kernels.graph.fbs_record import watch_winners
from dcx_kernels.nn.gated_conv import GatedConv2d

__all__ = ["GateCost", "memory_access"]


@dataclass(frozen=True)
class GateCost:
    """What convolutions touch, in bytes, and multiply-accumulates: means over images.

    Attributes:
        weight_bytes: filters of pairs (input channel that is not zero, winner).
        activation_bytes: inputs that are read and outputs that are written.
        gate_bytes: phi, of the input channels that are not zero; the paper does not count it.
        peak_bytes: the most that one layer needs at once: filters, inputs and outputs of a batch.
        macs: of convolutions.
        gate_macs: of gates.
        layers: name -> (input channels read, output channels computed), means.
    """

    weight_bytes: float
    activation_bytes: float
    gate_bytes: float
    peak_bytes: float
    macs: float
    gate_macs: float
    layers: dict[str, tuple[float, float]]


@torch.no_grad()
def memory_access(
    model: FBSModel, images: Iterable[Tensor], batch: int = 1, dense: bool = False
) -> GateCost:
    """Count, from the winners alone, what evaluation has to touch.

    Args:
        model: made by `convert_fbs`; it is in the mode it had, afterwards.
        images: batches (N, C, H, W) over which means are taken.
        batch: images at once, for the peak. Filters are read once for all of them, and count whole
            there where there is more than one image: their winners differ.
        dense: count as if no channel were ever skipped: the network before.

    Raises:
        ValueError: without an image.
    """
    if batch < 1:
        raise ValueError(expected("a batch of at least 1", batch, "memory_access"))
    modes = [(module, module.training) for module in model.modules()]
    # of every image: weight bytes, activation bytes, gate bytes, peak bytes, macs, gate macs
    sums, count = torch.zeros(6, dtype=torch.float64), 0
    channels: dict[str, Tensor] = {}
    try:
        model.eval()
        with watch_winners(model) as seen:
            for some in images:
                model(some)
                each = []
                for name, layer in model.gated.items():
                    watched = seen[name]
                    read, made = (m.sum(1).double().cpu() for m in watched[:2])
                    if dense:
                        read = torch.full_like(read, layer.in_channels)
                        made = torch.full_like(made, layer.out_channels)
                    each.append(_touched(layer, read, made, *watched[2:], batch))
                    both = torch.stack([read.sum(), made.sum()])
                    channels[name] = channels.get(name, torch.zeros_like(both)) + both
                layers = torch.stack(each)  # (layers, 6, N)
                total = layers.sum(0)
                total[3] = layers[:, 3].amax(0)
                sums += total.sum(1)
                count += some.shape[0]
    finally:
        for module, mode in modes:
            module.training = mode
    if not count:
        raise ValueError(expected("at least one image", count, "memory_access"))
    means = {name: (both / count).tolist() for name, both in channels.items()}
    weight, activation, gate, peak, macs, gate_macs = (sums / count).tolist()
    layers_ = {name: (read, made) for name, (read, made) in means.items()}
    return GateCost(weight, activation, gate, peak, macs, gate_macs, layers_)


def _touched(
    layer: GatedConv2d, read: Tensor, made: Tensor, in_pixels: int, out_pixels: int, batch: int
) -> Tensor:
    """Return the six figures (6, N) of one layer, from channels read and computed (N,)."""
    size = layer.weight.element_size()
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    weight = read * made * taps
    activation = read * in_pixels + made * out_pixels
    gate = read * layer.out_channels
    held = weight if batch == 1 else torch.full_like(weight, layer.weight.numel())
    peak = held + batch * activation
    figures = [size * weight, size * activation, size * gate, size * peak]
    return torch.stack([*figures, weight * out_pixels, gate])

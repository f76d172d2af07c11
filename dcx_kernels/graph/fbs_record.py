"""Which channels the gates chose over a data set: counts, and what one image reads and computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcx_kernels.graph.fbs import FBSModel
from dcx_kernels.nn.gated_conv import GatedConv2d
from dcx_kernels.nn.gated_conv_channels import SampleChannels
from dcx_kernels.ops.k_winners import k_winners

__all__ = ["Watched", "count_winners", "watch_winners"]


class Watched(NamedTuple):
    """What one gated layer did in one forward.

    Args:
        present: input channels that exist, (N, C) bool.
        chosen: channels it computed, (N, K) bool; a winner whose gate is 0 counts as skipped: its
            output is zero.
        in_pixels: H * W.
        out_pixels: P * Q.
    """

    present: Tensor
    chosen: Tensor
    in_pixels: int
    out_pixels: int


@contextlib.contextmanager
def watch_winners(model: FBSModel) -> Iterator[dict[str, Watched]]:
    """Collect, of the last forward, which channels each gated layer read and computed.

    Yields:
        a table by layer, filled by each forward.
    """
    seen: dict[str, Watched] = {}
    handles = []
    for name, layer in model.gated.items():

        def note(layer: Any, args: Any, out: SampleChannels, name: str = name) -> None:
            x = SampleChannels.of(args[0])
            pixels = x.values.shape[2:].numel(), out.values.shape[2:].numel()
            seen[name] = Watched(x.where_present(), _chosen(layer), *pixels)

        handles.append(layer.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def count_winners(model: FBSModel, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Count how many samples chose each channel, in evaluation mode.

    The model is in the mode it had, afterwards.

    Args:
        model: made by `convert_fbs`.
        images: batches (N, C, H, W).

    Returns:
        name -> counts (K,) int64.
    """
    modes = [(module, module.training) for module in model.modules()]
    counts = {
        name: torch.zeros(layer.out_channels, dtype=torch.int64, device=layer.weight.device)
        for name, layer in model.gated.items()
    }
    try:
        model.eval()
        with watch_winners(model) as seen:
            for batch in images:
                model(batch)
                for name, watched in seen.items():
                    counts[name] += watched.chosen.sum(0)
    finally:
        for module, mode in modes:
            module.training = mode
    return counts


def _chosen(layer: GatedConv2d) -> Tensor:
    gate = layer.gate
    assert gate is not None
    idx, _ = k_winners(gate, layer.num_winners)
    return torch.zeros_like(gate, dtype=torch.bool).scatter(1, idx, True) & (gate > 0)

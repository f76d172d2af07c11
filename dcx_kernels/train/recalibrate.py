"""Batch-norm statistics of the network that is kept, not of the many that were trained.

While channels are selected, every step's network is another one, so a running mean mixes the
statistics of thousands of networks. Before evaluation and export they are measured again for the
final one.

References:
    Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", section 3.2
    (post-statistics of batch normalization). https://arxiv.org/abs/1903.05134
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import Loader
from dcx_kernels.train.modes import channels

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Loader,
    *,
    sets: Mapping[str, ChannelSet] | None = None,
    batches: int | None = None,
) -> int:
    """Replace running statistics by their average over training batches.

    Each batch counts by its number of images. Inactive channels keep their statistics, everything
    but batch norm is in eval mode (no dropout), weights do not change, and the result depends on
    nothing but the weights and the batches.

    Args:
        model: a `ChannelModel` or any module with batch norm.
        loader: training batches, without augmentation.
        sets: channels to use, for a `ChannelModel`; those now active if None.
        batches: how many batches of epoch 0 to use; all if None.

    Returns:
        The number of batch-norm layers that were recalibrated.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    seen = 0
    try:
        with channels(model, sets):
            model.eval()
            for norm in norms:
                norm.train()
            for index, (images, _) in enumerate(loader.batches(0)):
                if index == batches:
                    break
                seen += images.shape[0]
                for norm in norms:  # 1 for the first batch: what was there before is forgotten
                    norm.momentum = images.shape[0] / seen
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)
    return len(norms)

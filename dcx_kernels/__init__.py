"""Train CNNs in which, at every step, only the chosen channels exist.

The public API::

    import dcx_kernels as dcx

    model = dcx.convert(vgg19(), torch.zeros(1, 3, 32, 32))
    selector = dcx.selectors.CUCB(model.groups, density=0.4)
    optimizer = dcx.optim.SGD(model, lr=0.1, momentum=0.9)
    for x, y in batches:
        model.set_active(selector.select())
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        selector.update(model.saliency())
        optimizer.step()
    model.set_active(selector.final())
    thin = dcx.compact(model)
"""

from dcx_kernels import nn, optim, selectors
from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import CheckpointError, DataError, NonFiniteError
from dcx_kernels.graph import (
    ChannelGroup,
    ChannelModel,
    Cost,
    FBSModel,
    GateCost,
    compact,
    compact_optimizer,
    convert,
    convert_fbs,
    cost,
    count_winners,
    cut_unused,
    load_compact,
    memory_access,
    revert,
    save_compact,
    watch_winners,
)
from dcx_kernels.nn import (
    GatedConv2d,
    SparseChannelBatchNorm2d,
    SparseChannelConv2d,
    SparseChannelLinear,
)
from dcx_kernels.nn.gated_conv import gate_penalty
from dcx_kernels.ops import (
    channel_batch_norm,
    channel_conv2d,
    channel_linear,
    gather_channels,
    scatter_channels,
)
from dcx_kernels.optim import clip_grad_norm_
from dcx_kernels.train import Trainer

__version__ = "0.1.0"

__all__ = [
    "ChannelGroup",
    "ChannelModel",
    "ChannelSet",
    "CheckpointError",
    "Cost",
    "DataError",
    "FBSModel",
    "GateCost",
    "GatedConv2d",
    "NonFiniteError",
    "SparseChannelBatchNorm2d",
    "SparseChannelConv2d",
    "SparseChannelLinear",
    "Trainer",
    "__version__",
    "channel_batch_norm",
    "channel_conv2d",
    "channel_linear",
    "clip_grad_norm_",
    "compact",
    "compact_optimizer",
    "convert",
    "convert_fbs",
    "cost",
    "count_winners",
    "cut_unused",
    "gate_penalty",
    "gather_channels",
    "load_compact",
    "memory_access",
    "nn",
    "optim",
    "revert",
    "save_compact",
    "scatter_channels",
    "selectors",
    "watch_winners",
]

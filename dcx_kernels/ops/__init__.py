"""One operator a file: checks, raw torch.library operators, autograd, function."""

from dcx_kernels.ops.channel_batch_norm import channel_batch_norm
from dcx_kernels.ops.channel_conv2d import channel_conv2d
from dcx_kernels.ops.channel_linear import channel_linear
from dcx_kernels.ops.gather import gather_channels, scatter_channels
from dcx_kernels.ops.k_winners import k_winners
from dcx_kernels.ops.sample_conv2d import sample_conv2d
from dcx_kernels.ops.select_channels import select_channels

__all__ = [
    "channel_batch_norm",
    "channel_conv2d",
    "channel_linear",
    "gather_channels",
    "k_winners",
    "sample_conv2d",
    "scatter_channels",
    "select_channels",
]

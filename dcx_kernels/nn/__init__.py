"""Layers with the names, defaults and state_dict keys of `torch.nn`, for active channels only."""

from dcx_kernels.nn.conv import SparseChannelConv2d
from dcx_kernels.nn.gated_conv import GatedConv2d
from dcx_kernels.nn.linear import SparseChannelLinear
from dcx_kernels.nn.norm import SparseChannelBatchNorm2d

__all__ = ["GatedConv2d", "SparseChannelBatchNorm2d", "SparseChannelConv2d", "SparseChannelLinear"]

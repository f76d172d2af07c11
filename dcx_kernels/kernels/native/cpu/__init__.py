"""The native backend of CPUs; what native code does not win is the reference's."""

from dcx_kernels.kernels.native.cpu.batch_norm import (
    channel_batch_norm_bwd,
    channel_batch_norm_fwd,
)
from dcx_kernels.kernels.native.cpu.convolution import channel_conv2d_wgrad
from dcx_kernels.kernels.native.cpu.gated_convolution import gated_conv2d, gates
from dcx_kernels.kernels.native.cpu.optimizer import adamw_slices_, sgd_slices_
from dcx_kernels.kernels.native.cpu.sample_convolution import (
    sample_conv2d_dgrad,
    sample_conv2d_fwd,
    sample_conv2d_wgrad,
)
from dcx_kernels.kernels.native.cpu.slices import gather_slices, scatter_slices_
from dcx_kernels.kernels.native.cpu.union import union_add
from dcx_kernels.kernels.reference import (
    channel_conv2d_dgrad,
    channel_conv2d_fwd,
    channel_linear_dgrad,
    channel_linear_fwd,
    channel_linear_wgrad,
    fused_conv2d_dgrad,
    fused_conv2d_fwd,
    fused_conv2d_wgrad,
    gather,
    k_winners,
    norm_act_bwd,
    norm_act_fwd,
    norm_fold,
    norm_fold_bwd,
    pack,
    sample_bias_grad,
    scatter,
    select_channels,
    unpack,
)

NAME = "native"
OPERATORS = (  # of torch.ops.dcx_native, which the library must have
    "adamw_slices",
    "batch_norm_bwd",
    "batch_norm_fwd",
    "gated_conv2d",
    "move_slices",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
    "sgd_slices",
    "union_add",
)

__all__ = [
    "NAME",
    "OPERATORS",
    "adamw_slices_",
    "channel_batch_norm_bwd",
    "channel_batch_norm_fwd",
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "channel_linear_dgrad",
    "channel_linear_fwd",
    "channel_linear_wgrad",
    "fused_conv2d_dgrad",
    "fused_conv2d_fwd",
    "fused_conv2d_wgrad",
    "gated_conv2d",
    "gates",
    "gather",
    "gather_slices",
    "k_winners",
    "norm_act_bwd",
    "norm_act_fwd",
    "norm_fold",
    "norm_fold_bwd",
    "pack",
    "sample_bias_grad",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
    "scatter",
    "scatter_slices_",
    "select_channels",
    "sgd_slices_",
    "union_add",
    "unpack",
]

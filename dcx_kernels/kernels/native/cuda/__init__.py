"""The native backend of CUDA GPUs; what native code does not serve is the reference's."""

from dcx_kernels.kernels.native.cuda.batch_norm import (
    channel_batch_norm_bwd,
    channel_batch_norm_fwd,
)
from dcx_kernels.kernels.native.cuda.convolution import (
    channel_conv2d_dgrad,
    channel_conv2d_fwd,
    channel_conv2d_wgrad,
    sample_conv2d_dgrad,
    sample_conv2d_fwd,
    sample_conv2d_wgrad,
)
from dcx_kernels.kernels.native.cuda.gate import k_winners
from dcx_kernels.kernels.native.cuda.optimizer import adamw_slices_, sgd_slices_
from dcx_kernels.kernels.native.cuda.selection import select_channels
from dcx_kernels.kernels.native.cuda.slices import gather_slices, scatter_slices_
from dcx_kernels.kernels.reference import (
    channel_linear_dgrad,
    channel_linear_fwd,
    channel_linear_wgrad,
    fused_conv2d_dgrad,
    fused_conv2d_fwd,
    fused_conv2d_wgrad,
    gated_conv2d,
    gather,
    norm_act_bwd,
    norm_act_fwd,
    norm_fold,
    norm_fold_bwd,
    pack,
    sample_bias_grad,
    scatter,
    union_add,
    unpack,
)

NAME = "native"
OPERATORS = (  # of torch.ops.dcx_native, which the library must have
    "adamw_slice_blocks",
    "batch_norm_bwd",
    "batch_norm_fwd",
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "k_winners",
    "move_slice_blocks",
    "packed_conv2d_bwd",
    "packed_conv2d_fwd",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
    "select_channels",
    "sgd_slice_blocks",
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

"""Triton kernels for GPUs; under Triton's interpreter they run on a CPU, in tests.

What is not here is the library's business on a GPU as well (linear layers are products of packed
matrices), and float64, which no GPU that trains networks is fast at: ATen, as in the reference.
"""

from dcx_kernels._env import autotune_enabled
from dcx_kernels.kernels.reference import (
    channel_linear_dgrad,
    channel_linear_fwd,
    channel_linear_wgrad,
    gated_conv2d,
    pack,
    sample_bias_grad,
    unpack,
)
from dcx_kernels.kernels.triton._launch import INTERPRETED, serves
from dcx_kernels.kernels.triton.batch_norm import (
    channel_batch_norm_bwd,
    channel_batch_norm_fwd,
)
from dcx_kernels.kernels.triton.channels import gather, scatter
from dcx_kernels.kernels.triton.dispatch import (
    channel_conv2d_dgrad,
    channel_conv2d_fwd,
    channel_conv2d_wgrad,
    sample_conv2d_dgrad,
    sample_conv2d_fwd,
    sample_conv2d_wgrad,
)
from dcx_kernels.kernels.triton.fold import norm_fold, norm_fold_bwd
from dcx_kernels.kernels.triton.fused import (
    fused_conv2d_dgrad,
    fused_conv2d_fwd,
    fused_conv2d_wgrad,
    norm_act_bwd,
    norm_act_fwd,
)
from dcx_kernels.kernels.triton.gate import k_winners
from dcx_kernels.kernels.triton.optimizer import adamw_slices_, sgd_slices_
from dcx_kernels.kernels.triton.selection import select_channels
from dcx_kernels.kernels.triton.slices import gather_slices, scatter_slices_
from dcx_kernels.kernels.triton.union import union_add

if autotune_enabled():
    from dcx_kernels.kernels.triton import tune

    tune.install()

NAME = "triton"
FUSES = True  # a convolution with the norms around it is worth while

__all__ = [
    "FUSES",
    "INTERPRETED",
    "NAME",
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
    "serves",
    "sgd_slices_",
    "union_add",
    "unpack",
]

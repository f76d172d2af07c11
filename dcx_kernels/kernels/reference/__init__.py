"""ATen kernels: the definition of every operator, the oracle of every other backend, the fallback.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. "Compact" tensors hold active channels only; index lists are sorted unique
int64.
"""

from dcx_kernels.kernels.reference.batch_norm import (
    channel_batch_norm_bwd,
    channel_batch_norm_fwd,
)
from dcx_kernels.kernels.reference.channels import gather, scatter
from dcx_kernels.kernels.reference.convolution import (
    channel_conv2d_dgrad,
    channel_conv2d_fwd,
    channel_conv2d_wgrad,
    channel_linear_dgrad,
    channel_linear_fwd,
    channel_linear_wgrad,
)
from dcx_kernels.kernels.reference.fused import (
    fused_conv2d_dgrad,
    fused_conv2d_fwd,
    fused_conv2d_wgrad,
    norm_act_bwd,
    norm_act_fwd,
    norm_fold,
    norm_fold_bwd,
)
from dcx_kernels.kernels.reference.gate import k_winners
from dcx_kernels.kernels.reference.gated_convolution import gated_conv2d
from dcx_kernels.kernels.reference.sample_convolution import (
    sample_bias_grad,
    sample_conv2d_dgrad,
    sample_conv2d_fwd,
    sample_conv2d_wgrad,
)
from dcx_kernels.kernels.reference.selection import select_channels
from dcx_kernels.kernels.reference.slices import (
    adamw_slices_,
    gather_slices,
    scatter_slices_,
    sgd_slices_,
)
from dcx_kernels.kernels.reference.union import union_add
from dcx_kernels.kernels.reference.weights import (
    gather_rows,
    pack,
    row_index,
    scatter_rows_,
    unpack,
)

NAME = "reference"

__all__ = [
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
    "gather_rows",
    "gather_slices",
    "k_winners",
    "norm_act_bwd",
    "norm_act_fwd",
    "norm_fold",
    "norm_fold_bwd",
    "pack",
    "row_index",
    "sample_bias_grad",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
    "scatter",
    "scatter_rows_",
    "scatter_slices_",
    "select_channels",
    "sgd_slices_",
    "union_add",
    "unpack",
]

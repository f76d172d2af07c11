"""ATen kernels: the definition of every operator, the oracle of every other backend, the fallback.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter, G groups. "Compact" tensors hold active channels only; index lists are sorted unique
int64.
"""

from dcx_kernels.kernels.reference.batch_norm import (
    channel_batch_norm_bwd,
    channel_batch_norm_fwd,
)
from dcx_kernels.kernels.reference.convolution import (
    channel_conv2d_dgrad,
    channel_conv2d_fwd,
    channel_conv2d_wgrad,
    channel_linear_dgrad,
    channel_linear_fwd,
    channel_linear_wgrad,
)
from dcx_kernels.kernels.reference.union import union_add
from dcx_kernels.kernels.reference.weights import (
    gather_rows,
    gather_vectors,
    number_through,
    pack,
    row_index,
    scatter_rows_,
    scatter_vectors_,
    unpack,
)

__all__ = [
    "channel_batch_norm_bwd",
    "channel_batch_norm_fwd",
    "channel_conv2d_dgrad",
    "channel_conv2d_fwd",
    "channel_conv2d_wgrad",
    "channel_linear_dgrad",
    "channel_linear_fwd",
    "channel_linear_wgrad",
    "gather_rows",
    "gather_vectors",
    "number_through",
    "pack",
    "row_index",
    "scatter_rows_",
    "scatter_vectors_",
    "union_add",
    "unpack",
]

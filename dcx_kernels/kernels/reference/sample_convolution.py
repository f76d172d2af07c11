"""Convolution in which every sample has active channels of its own.

A gate chooses channels sample by sample, the same number for all. The samples of a batch become the
groups of one grouped convolution, each with its own slice of the weight.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter. Compact tensors hold active channels only: channel ``j`` of sample ``n`` of x is channel
``in_idx[n, j]``. Index lists are (N, c) and (N, k) int64, unique within a sample; None means all
channels.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels.layout import layout
from dcx_kernels.kernels.window import output_pixels

__all__ = [
    "sample_bias_grad",
    "sample_conv2d_dgrad",
    "sample_conv2d_fwd",
    "sample_conv2d_wgrad",
]

_convolution_backward = torch.ops.aten.convolution_backward.default


def sample_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve x (N, c, H, W), each sample with its slice of the weight: y (N, k, P, Q).

    ``weight`` (K, C, R, S) and ``bias`` (K,) are full.
    """
    samples = x.shape[0]
    filters = _filters(weight, in_idx, out_idx, samples)
    biases = None if bias is None else bias[_listed(out_idx, samples, weight.shape[0], bias)]
    if x.numel() == 0 or filters.numel() == 0:
        pixels = output_pixels(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        shape = (samples, filters.shape[1], *pixels)
        y = _empty(shape, like=x).zero_()
        return y if biases is None else y + biases[:, :, None, None]
    y = torch.convolution(
        _end_to_end(x), filters.flatten(0, 1), None if biases is None else biases.flatten(),
        stride, padding, dilation, False, [0, 0], samples,
    )  # fmt: skip
    return _apart(y, samples, like=x)


def sample_conv2d_dgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return dx (N, c, H, W); ``x`` gives shape and layout only."""
    if x.numel() == 0 or dy.numel() == 0:
        return torch.zeros_like(x)
    filters = _filters(weight, in_idx, out_idx, x.shape[0]).flatten(0, 1)
    dx = _convolution_backward(
        _end_to_end(dy), _end_to_end(x), filters, None, stride, padding, dilation, False, [0, 0],
        x.shape[0], [True, False, False],
    )[0]  # fmt: skip
    return _apart(dx, x.shape[0], like=x)


def sample_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the full dw (K, C, R, S), summed over samples; zeros where no sample has the pair."""
    K, C, R, S = weight_shape
    dw = torch.zeros((K, C, R, S), dtype=_wide(x), device=x.device)
    if x.numel() == 0 or dy.numel() == 0:
        return dw.to(x.dtype)
    (samples, c), k = x.shape[:2], dy.shape[1]
    filters = x.new_empty((samples * k, c, R, S))  # only its shape is read
    each = _convolution_backward(
        _end_to_end(dy), _end_to_end(x), filters, None, stride, padding, dilation, False, [0, 0],
        samples, [False, True, False],
    )[1]  # fmt: skip
    pairs = _pairs(in_idx, out_idx, samples, C, K, x)
    dw.index_put_(pairs, each.view(samples, k, c, R, S).to(dw.dtype), accumulate=True)
    return dw.to(x.dtype)


def sample_bias_grad(dy: Tensor, out_idx: Tensor | None, K: int) -> Tensor:
    """Return the full gradient of the bias (K,) from dy (N, k, P, Q)."""
    each = dy.sum((2, 3), dtype=_wide(dy))
    channels = _listed(out_idx, dy.shape[0], K, dy)
    return each.new_zeros((dy.shape[0], K)).scatter(1, channels, each).sum(0).to(dy.dtype)


def _filters(weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, samples: int) -> Tensor:
    """Copy every sample's slice of the weight: (N, k, c, R, S)."""
    K, C = weight.shape[:2]
    return weight[_pairs(in_idx, out_idx, samples, C, K, weight)]


def _pairs(
    in_idx: Tensor | None, out_idx: Tensor | None, samples: int, C: int, K: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Index the active pairs of a full weight: broadcasts to (N, k, c)."""
    rows, columns = _listed(out_idx, samples, K, like), _listed(in_idx, samples, C, like)
    return rows[:, :, None], columns[:, None, :]


def _listed(idx: Tensor | None, samples: int, channels: int, like: Tensor) -> Tensor:
    if idx is not None:
        return idx
    return torch.arange(channels, device=like.device).expand(samples, channels)


def _end_to_end(x: Tensor) -> Tensor:
    """Make the samples groups of channels of one image: (1, N * channels, H, W)."""
    return x.reshape(1, -1, *x.shape[2:])


def _apart(joined: Tensor, samples: int, like: Tensor) -> Tensor:
    """Undo `_end_to_end`, in the layout of ``like``."""
    _, channels, *pixels = joined.shape
    each = joined.reshape(samples, channels // samples, *pixels)
    return _empty(each.shape, like).copy_(each)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like))


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype that samples are summed in."""
    return torch.promote_types(x.dtype, torch.float32)

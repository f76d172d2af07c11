"""The tensor between gated layers: every sample holds the channels that its own gate chose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcx_kernels.errors import expected
from dcx_kernels.ops.k_winners import k_winners

__all__ = ["SampleChannels", "put_channels", "take_channels", "union_add"]


class SampleChannels(NamedTuple):
    """The channels of each sample that exist; all others are zero.

    Args:
        values: compact; channel j of sample n is channel ``idx[n, j]``.
        idx: channels of every sample, unique, int64; None: all of them, in order.
        num_channels: of the dense tensor.
        nonnegative: no value is below zero (what a ReLU returns).
        present: of a sum: channels that exist; others in ``idx`` only make lists equally long.

    Shape:
        values (N, c, H, W); idx (N, c); present (N, C) bool.
    """

    values: Tensor
    idx: Tensor | None
    num_channels: int
    nonnegative: bool = False
    present: Tensor | None = None

    @staticmethod
    def of(x: Tensor | SampleChannels) -> SampleChannels:
        """Return x, or a dense tensor as the channels that all exist."""
        return x if isinstance(x, SampleChannels) else SampleChannels(x, None, x.shape[1])

    def dense(self) -> Tensor:
        """Return all channels, (N, C, H, W), with zeros where they are absent."""
        if self.idx is None:
            return self.values
        return put_channels(self.values, self.idx, self.num_channels)

    def where_present(self) -> Tensor:
        """Return which channels exist, (N, C) bool."""
        if self.present is not None:
            return self.present
        shape, device = (self.values.shape[0], self.num_channels), self.values.device
        if self.idx is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        return torch.zeros(shape, dtype=torch.bool, device=device).scatter(1, self.idx, True)

    def with_values(self, values: Tensor, relu: bool = False) -> SampleChannels:
        """Return other values of the same channels (what a layer of each channel alone returns)."""
        return self._replace(values=values, nonnegative=relu or self.nonnegative)

    def padded(self, low: int, high: int) -> SampleChannels:
        """Add channels that are absent in every sample, before (low) and behind those there are."""
        idx = self.idx
        if idx is None:
            n, c = self.values.shape[:2]
            idx = torch.arange(c, device=self.values.device).expand(n, c)
        present = self.present
        if present is not None:
            present = torch.nn.functional.pad(present, (low, high))
        channels = self.num_channels + low + high
        return self._replace(idx=idx + low, num_channels=channels, present=present)


def take_channels(x: Tensor, idx: Tensor) -> Tensor:
    """Return the channels ``idx`` (N, k) of each sample of x (N, C, ...): (N, k, ...)."""
    rows = _rows(idx, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows).view(*idx.shape, *x.shape[2:])


def put_channels(values: Tensor, idx: Tensor, channels: int) -> Tensor:
    """Return (N, channels, ...) that holds ``values`` (N, k, ...) at ``idx`` (N, k), else zero."""
    n, rest = values.shape[0], values.shape[2:]
    flat = values.new_zeros((n * channels, *rest))
    return flat.index_copy(0, _rows(idx, channels), values.flatten(0, 1)).view(n, channels, *rest)


def _rows(idx: Tensor, channels: int) -> Tensor:
    """Return the places of channels ``idx`` (N, k) among the N * channels of a batch."""
    first = torch.arange(0, idx.shape[0] * channels, channels, device=idx.device)
    return (idx + first[:, None]).flatten()


def union_add(a: Tensor | SampleChannels, b: Tensor | SampleChannels) -> SampleChannels:
    """Add; a channel of a sample is absent from the sum iff it is absent from both terms.

    Lists have one length for all samples: that of the largest union. Other samples fill up with
    channels that are zero, the lowest ones.

    Raises:
        ValueError: on terms of unlike channel counts.

    References:
        Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", appendix B.
    """
    a, b = SampleChannels.of(a), SampleChannels.of(b)
    if a.num_channels != b.num_channels:
        what = f"terms of {a.num_channels} channels"
        raise ValueError(expected(what, b.num_channels, "union_add"))
    both = a.nonnegative and b.nonnegative
    if a.idx is None or b.idx is None:
        return SampleChannels(a.dense() + b.dense(), None, a.num_channels, both)
    present = a.where_present() | b.where_present()
    width = _width(present, a.idx.shape[1] + b.idx.shape[1])
    total = a.dense() + b.dense()
    if width == a.num_channels:
        return SampleChannels(total, None, a.num_channels, both, present)
    idx, _ = k_winners(present.float(), width)
    return SampleChannels(take_channels(total, idx), idx, a.num_channels, both, present)


def _width(present: Tensor, most: int) -> int:
    """Return the length of the longest union; its bound where asking waits or breaks a graph."""
    waits = present.device.type != "cpu" or torch.compiler.is_compiling()
    if waits or present.shape[0] == 0:
        return min(most, present.shape[1])
    return int(present.sum(1).max())

"""Sets, leaves and the masked definitions that the operators are compared with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels import ChannelSet

Wanted = int | Sequence[int] | None


def channels(wanted: Wanted, num_channels: int) -> ChannelSet | None:
    """Return None, the set of the given channels, or a random set of ``wanted`` channels."""
    if wanted is None:
        return None
    chosen = torch.randperm(num_channels)[:wanted] if isinstance(wanted, int) else wanted
    return ChannelSet(chosen, num_channels)


def mask_of(active: ChannelSet | None, num_channels: int) -> Tensor:
    """Return the bool mask of a set; None means all channels."""
    return torch.ones(num_channels, dtype=torch.bool) if active is None else active.mask()


def indices_of(active: ChannelSet | None, num_channels: int) -> Tensor:
    """Return the indices of a set; None means all channels."""
    return torch.arange(num_channels) if active is None else active.indices


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return an independent leaf of the same values and strides that requires a gradient."""
    if tensor is None:
        return None
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype)
    return copy.copy_(tensor.detach()).requires_grad_()


def spread(tensor: Tensor) -> Tensor:
    """Return the same values in a non-contiguous tensor: every second element of the last axis."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1).flatten(-2)[..., ::2]


def backward(y: Tensor, upstream: Tensor, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Run backward from y and return the gradients by name; an absent one is an error."""
    y.backward(upstream.to(y.dtype))
    grads = {}
    for name, tensor in leaves.items():
        if tensor is not None:
            assert tensor.grad is not None, f"no gradient of {name}"
            grads[name] = tensor.grad
    return grads


# --- convolution ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvCase:
    """One convolution with its sets; ``inputs`` makes its tensors."""

    id: str
    C: int
    K: int
    in_: Wanted = None
    out: Wanted = None
    N: int = 2
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    bias: bool = True
    layout: str = "contiguous"  # channels_last, strided, unbatched
    compact: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # stride, padding, dilation

    def sets(self) -> tuple[ChannelSet | None, ChannelSet | None]:
        return channels(self.in_, self.C), channels(self.out, self.K)

    def tensors(
        self, in_active: ChannelSet | None, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, weight and bias with random values."""
        count = len(in_active) if in_active is not None and self.compact else self.C
        x = torch.randn(self.N, count, *self.size, dtype=dtype)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.layout == "strided":
            x = spread(x)
        elif self.layout == "unbatched":
            x = x[0]
        weight = torch.randn(self.K, self.C // self.groups, *self.kernel, dtype=dtype)
        return x, weight, torch.randn(self.K, dtype=dtype) if self.bias else None

    def also(self, **changes: Any) -> ConvCase:
        return replace(self, **changes)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ChannelSet | None,
    out_active: ChannelSet | None,
    **options: Any,
) -> Tensor:
    """The definition in the docstring of `channel_conv2d`; a compact x is made dense first."""
    dim = x.dim() - 3
    groups = options.get("groups", 1)
    x = masked_input(x, in_active, weight.shape[1] * groups, dim)
    with warnings.catch_warnings():  # torch warns that an even kernel with 'same' copies x
        warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)
        y = F.conv2d(x, weight, bias, **options)
    return y.index_select(dim, indices_of(out_active, weight.shape[0]))


def masked_input(x: Tensor, active: ChannelSet | None, num_channels: int, dim: int) -> Tensor:
    """Return dense x with zeros at inactive channels."""
    if active is None:
        return x
    if x.shape[dim] != num_channels:
        shape = list(x.shape)
        shape[dim] = num_channels
        return x.new_zeros(shape).index_copy(dim, active.indices, x)
    shape = [1] * x.dim()
    shape[dim] = num_channels
    return x * active.mask().view(shape).to(x.dtype)


def slice_mask(
    shape: Sequence[int], in_active: ChannelSet | None, out_active: ChannelSet | None, groups: int
) -> Tensor:
    """Return the bool mask of a conv weight's active slice, from the definition of a group."""
    num_out, per_group = shape[0], shape[1]
    out = mask_of(out_active, num_out)
    in_ = mask_of(in_active, per_group * groups).view(groups, per_group)
    of_row = in_[torch.arange(num_out) // (num_out // groups)]
    mask = out.unsqueeze(1) & of_row
    return mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(tuple(shape))

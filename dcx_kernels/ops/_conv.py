"""What the operators of convolutions share: groups, shapes, index lists, saliency of weights.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W input, P Q output,
R S filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.channel_set import ChannelSet, agree, known
from dcx_kernels.errors import expected
from dcx_kernels.kernels.layout import layout
from dcx_kernels.kernels.window import output_pixels
from dcx_kernels.ops.gather import gather_channels
from dcx_kernels.ops.grouping import ONE_EACH

__all__ = [
    "as_compact",
    "batch_saliency",
    "count_macs",
    "fake_output",
    "groups_in",
    "index_list",
    "note_lengths",
    "pair",
]


def groups_in(active_groups: int, x: Tensor) -> int:
    """Return the groups that exist, of which `ONE_EACH` is as many as x has channels."""
    return x.shape[1] if active_groups == ONE_EACH else active_groups


def fake_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_idx: Tensor | None,
    out_idx: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    active_groups: int,
) -> Tensor:
    """Return an output of the right shape and layout, without computing."""
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    out = weight.shape[0] if out_idx is None else out_idx.shape[0]
    if has_free_unbacked_symbols([out, x.shape[1]]):  # torch's own fake asks for numbers
        pixels = output_pixels(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        return torch.empty(
            (x.shape[0], out, *pixels), dtype=x.dtype, device=x.device, memory_format=layout(x)
        )
    active = groups_in(active_groups, x)
    packed = weight.new_empty((out, x.shape[1] // active, *weight.shape[2:]))
    y: Tensor = torch.ops.aten.convolution(
        x, packed, None, stride, padding, dilation, False, [0, 0], active
    )
    return y


def count_macs(y: Sequence[int], channels: int, kernel: Sequence[int], active_groups: int) -> int:
    """Count multiply-accumulates of y (N, k, P, Q) from c channels with an R x S filter."""
    per_group = 1 if active_groups == ONE_EACH else channels // active_groups
    return math.prod(y) * per_group * kernel[0] * kernel[1]


def as_compact(x: Tensor, active: ChannelSet) -> Tensor:
    """Return the active channels of x, which may be them already."""
    if known(x.shape[1] == len(active)):
        return x
    if not known(x.shape[1] == active.num_channels):
        if torch.compiler.is_compiling():  # a length that only the run knows
            torch._check(x.shape[1] == len(active))
            return x
        what = f"{active.num_channels} (dense) or {len(active)} (compact) input channels"
        raise ValueError(expected(what, x.shape[1], "x"))
    return gather_channels(x, active)


def note_lengths(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_active: ChannelSet | None, active: int
) -> None:
    """Tell torch.compile, which knows no length of a packed tensor, what they have in common."""
    out = weight.shape[0] if out_active is None else len(out_active)
    lengths = [(weight.shape[0], out)]
    if active != ONE_EACH:
        lengths.append((weight.shape[1] * active, x.shape[1]))
    if bias is not None:
        lengths.append((bias.shape[0], out))
    assert all(agree(length, wanted) for length, wanted in lengths)


def index_list(active: ChannelSet | None, like: Tensor) -> Tensor | None:
    """Return the index list of a set on the device of ``like``, or None if all are active."""
    return None if active is None or active.is_full else active.to(like.device).indices


def pair(value: int | Sequence[int]) -> list[int]:
    """Return two numbers for one, or the two that are given."""
    if isinstance(value, int):
        return [value, value]
    both = list(value)
    return both * 2 if len(both) == 1 else both


def batch_saliency(weight: Tensor, dw: Tensor, bias: Tensor | None, db: Tensor | None) -> Tensor:
    """Sum of (dL/dy) y over batch and pixels, from weights and their gradients: no pass over y."""
    acc = torch.promote_types(weight.dtype, torch.float32)
    signed = (weight.to(acc) * dw).flatten(1).sum(1)
    if bias is not None:
        assert db is not None
        signed = signed + bias.to(acc) * db
    return signed

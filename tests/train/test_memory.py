"""Bytes saved for backward are those that can be counted by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dcx_kernels.train.memory import saved_bytes


def test_saved_bytes_of_a_linear_layer_is_its_input() -> None:
    layer, x = nn.Linear(10, 4), torch.randn(8, 10)
    assert saved_bytes(lambda: layer(x), layer) == 8 * 10 * 4


def test_saved_bytes_counts_shared_memory_once() -> None:
    layer = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    x = torch.randn(5, 6)
    # the input, and the output of ReLU; the second linear layer saves the same memory again
    assert saved_bytes(lambda: layer(x), layer) == 2 * 5 * 6 * 4
    second = nn.Linear(6, 2)
    both = nn.Sequential(*layer, second)
    assert saved_bytes(lambda: both(x), both) == 2 * 5 * 6 * 4


def test_saved_bytes_counts_packed_weights_but_not_parameters() -> None:
    layer = nn.Linear(10, 4, bias=False)
    index = torch.tensor([0, 2])
    x = torch.randn(8, 10, requires_grad=True)

    def packed() -> torch.Tensor:
        return F.linear(x, layer.weight[index])

    # input, packed weight of 2 x 10 floats, index of two int64
    assert saved_bytes(packed, layer) == 8 * 10 * 4 + 2 * 10 * 4 + 2 * 8


def test_saved_bytes_of_a_view_is_the_span_it_keeps() -> None:
    layer, wide = nn.Linear(10, 4), torch.randn(8, 30)
    assert saved_bytes(lambda: layer(wide[:, :10]), layer) == (7 * 30 + 10) * 4
    assert saved_bytes(lambda: layer(wide[2:4, 5:15]), layer) == (30 + 10) * 4


def test_saved_bytes_of_a_reused_buffer_is_what_is_in_it() -> None:
    layer, buffer = nn.Linear(10, 4), torch.randn(1000)
    assert saved_bytes(lambda: layer(buffer[:80].view(8, 10)), layer) == 80 * 4


def test_saved_bytes_without_gradient_is_zero() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        assert saved_bytes(lambda: layer(torch.randn(2, 3)), layer) == 0

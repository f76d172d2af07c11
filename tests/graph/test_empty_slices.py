"""A slice of which no channel is active: nothing is convolved, and nothing is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.kernels import reference
from tolerances import RELATIVE, assert_exact, assert_gradients_close


class HalfAndHalf(nn.Module):
    """Two halves of a tensor go different ways, as in ShuffleNet."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=bias)
        self.c, self.head = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 7, 7) -> (N, 4)."""
        first, second = self.norm(self.a(x)).relu().chunk(2, 1)
        return self.head(torch.cat([self.c(first), self.b(second)], 1).mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chosen", [[0, 2], [5], [1, 6]])
def test_sparse_mask_and_thin_agree_when_a_half_is_empty(chosen: list[int], bias: bool) -> None:
    dense = HalfAndHalf(bias).double()
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    results = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution, saliency="sample")
        optimizer = dcx.optim.SGD(model, lr=0.1, momentum=0.9, weight_decay=1e-2)
        model.set_active({"a": dcx.ChannelSet(chosen, 8), "b": dcx.ChannelSet([1, 2], 5)})
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        thin = dcx.compact(model.eval())
        with torch.no_grad():
            found = {"logits": model(x), **model.saliency("sample")}
            assert_gradients_close({"thin": thin(x)}, {"thin": found["logits"]}, RELATIVE)
        assert sum(p.numel() for p in thin.parameters()) == dcx.cost(model).params
        results.append({**found, **model.state_dict()})
    assert_gradients_close(*results)


def test_reference_convolves_no_channel_to_zeros_or_the_bias() -> None:
    x, weight, bias = torch.randn(2, 0, 7, 6), torch.randn(4, 0, 3, 3), torch.randn(4)
    window = ([2, 1], [1, 0], [1, 2])
    y = reference.channel_conv2d_fwd(x, weight, bias, None, None, *window, 1, 1)
    like = torch.conv2d(torch.zeros(2, 1, 7, 6), torch.zeros(4, 1, 3, 3), bias, *window)
    assert_exact(y, like)
    none = reference.channel_conv2d_fwd(x, weight, None, None, None, *window, 1, 1)
    assert_exact(none, torch.zeros_like(like))
    dx = reference.channel_conv2d_dgrad(y, x, weight, None, None, *window, 1, 1)
    assert dx.shape == x.shape
    assert reference.channel_conv2d_wgrad(y, x, [3, 3], *window, 1).shape == weight.shape

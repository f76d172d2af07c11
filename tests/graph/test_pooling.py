"""Average pooling to one pixel, which torch.compile cannot trace, is replaced by the same mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dcx_kernels.graph.pooling import pool_by_mean
from tolerances import assert_exact


class Pools(nn.Module):
    """Pooling of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.one, self.pair, self.four = (nn.AdaptiveAvgPool2d(s) for s in (1, (1, 1), 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.conv(x))
        ones = self.one(x) + self.pair(x) + F.adaptive_avg_pool2d(x, output_size=(1, 1))
        return self.four(x) + F.adaptive_avg_pool2d(x, (2, 1)) + ones


def test_only_pooling_to_one_pixel_becomes_a_mean() -> None:
    network, x = Pools(), torch.randn(2, 3, 9, 8)
    graph = fx.symbolic_trace(network).graph
    pool_by_mean(network, {True: graph})
    targets = [node.target for node in graph.nodes]
    assert targets.count(torch.mean) == 3 and targets.count(F.adaptive_avg_pool2d) == 1
    assert "four" in targets and not {"one", "pair"} & set(targets)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.to(memory_format=layout)
        assert_exact(fx.GraphModule(network, graph)(given), network(given))

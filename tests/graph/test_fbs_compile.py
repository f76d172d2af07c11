"""torch.compile of a network with gates: one graph in evaluation and in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import dcx_kernels as dcx
from tolerances import assert_gradients_close

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch 2.11 warns of what it does itself: tracing an autograd.Function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Residual(nn.Module):
    """Few layers, as compiling takes its time: a stem, one block, a sum of unlike winners."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.a_norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.b_norm = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """Two layers, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.b_norm = nn.Conv2d(8, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b_norm(self.b(self.a_norm(self.a(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(params=[Plain, Residual], ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> dcx.FBSModel:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return dcx.convert_fbs(request.param().double(), density=0.5)


def _images(n: int) -> Tensor:
    return torch.randn(n, 3, 9, 9, dtype=torch.float64)


def test_evaluation_is_one_graph(model: dcx.FBSModel) -> None:
    model.train()(_images(8))
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for density in (0.5, 1.0):  # with the winners of each sample, and all channels
            model.set_density(density)
            x = _images(3)
            assert_gradients_close({"logits": compiled(x)}, {"logits": model(x)})


@pytest.mark.parametrize("stats", ["batch", "active"])
def test_training_is_one_graph_with_the_same_gradients(model: dcx.FBSModel, stats: str) -> None:
    model.train().set_stats(stats)
    x, found = _images(4), []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        model.zero_grad()
        forward(x).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({**gradients, **{n: b.clone() for n, b in model.named_buffers()}})
    assert_gradients_close(found[1], found[0])


def test_new_winners_compile_nothing(model: dcx.FBSModel) -> None:
    counter = CompileCounter()
    model.eval()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for _ in range(4):  # each image has channels of its own
            compiled(_images(2))
    assert counter.frame_count == 1

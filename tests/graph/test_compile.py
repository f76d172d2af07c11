"""torch.compile of converted networks: no graph break, one graph for all sets, numbers as in eager.

`networks` of their own: compiling takes time by the layer, so these have as few as they can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dcx_kernels as dcx
from networks import random_sets
from tolerances import assert_gradients_close

BATCH, CLASSES = 5, 4
SINGLE_AND_ALL = (0.01, 0.4, 0.7, 1.0)  # densities: one channel and all of them included
# torch 2.11 warns of what it does itself: tracing an autograd.Function, loading inductor
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _conv(c: int, k: int, size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(c, k, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(k), nn.ReLU())


class Plain(nn.Module):
    """As VGG: several pixels flattened into a linear layer; also what few networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, momentum=None)
        self.grouped, self.slope = nn.Conv2d(6, 8, 3, groups=2), nn.PReLU(8)
        self.head = nn.Linear(8 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.max_pool2d(self.slope(self.grouped(x)), 2).flatten(1))


class Residual(nn.Module):
    """As ResNet: an identity and a projection on the shortcut, pooling to one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside = _conv(3, 6), _conv(6, 7)
        self.back = nn.Sequential(nn.Conv2d(7, 6, 3, bias=False, padding=1), nn.BatchNorm2d(6))
        self.short, self.long = nn.Conv2d(6, 5, 1), _conv(6, 5)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.back(self.inside(x)))
        return self.head(self.short(x) + self.long(x))


class Dense(nn.Module):
    """As DenseNet: norms over concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 5)
        self.norm, self.conv = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.last, self.head = nn.BatchNorm2d(9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), (1, 1)).flatten(1))


class Shuffle(nn.Module):
    """As ShuffleNet: split, depthwise, concatenate, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = _conv(3, 8), _conv(4, 6, 1), _conv(6, 4, 1)
        depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.depthwise, self.head = nn.Sequential(depthwise, nn.BatchNorm2d(6)), _conv(8, 5)
        self.classes = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.down(self.depthwise(self.up(right)))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.classes(self.head(x).mean((2, 3)))


class Twins:
    """A network converted twice from the same weights: one runs in eager mode, one compiled."""

    def __init__(
        self,
        network: Callable[[], nn.Module],
        backend: str = "aot_eager",
        compact: bool = True,
        dtype: torch.dtype = torch.float64,
        **options: str,
    ) -> None:
        dense = network().to(dtype)
        self.x = torch.randn(BATCH, 3, 8, 8, dtype=dtype)
        self.t = torch.randint(0, CLASSES, (BATCH,))
        self.counter = CompileCounterWithBackend(backend)
        self.models = [dcx.convert(dense, self.x, **options) for _ in range(2)]
        compiled = torch.compile(self.models[1], backend=self.counter, fullgraph=True)
        self.runs = [self.models[0], compiled]
        self.optimizers = [_sgd(model, compact) for model in self.models]

    def step(self, sets: dict[str, dcx.ChannelSet], micro_batches: int = 1) -> None:
        """Train both on the sets, and compare outputs and saliency."""
        seen = []
        for model, run, optimizer in zip(self.models, self.runs, self.optimizers, strict=True):
            model.set_active(sets)
            model.zero_grad()
            optimizer.zero_grad()
            for x, t in zip(self.x.chunk(micro_batches), self.t.chunk(micro_batches), strict=True):
                y = run(x)
                F.cross_entropy(y, t).backward()
            optimizer.step()
            seen.append({"y": y.detach(), **self._saliency(model)})
        assert_gradients_close(seen[1], seen[0])

    @staticmethod
    def _saliency(model: dcx.ChannelModel) -> dict[str, Tensor]:
        kinds = {"sample": ("batch", "sample"), "batch": ("batch",), None: ()}
        return {
            f"{kind} {name}": value
            for kind in kinds[model.saliency_reduction]
            for name, value in model.saliency(kind).items()
        }

    def evaluate(self) -> None:
        """Compare both in evaluation."""
        for model in self.models:
            model.eval()
        with torch.no_grad():
            eager, compiled = (run(self.x) for run in self.runs)
        assert_gradients_close({"y": compiled}, {"y": eager})
        for model in self.models:
            model.train()

    def train(self, steps: int, micro_batches: int = 1) -> int:
        """Take steps with a new set for every group; return the number of compilations."""
        before = copy.deepcopy(self.models[0].state_dict())
        for _ in range(steps):
            self.step(random_sets(self.models[0], SINGLE_AND_ALL), micro_batches)
        self.evaluate()
        eager, compiled = (model.state_dict() for model in self.models)
        assert_gradients_close(compiled, eager)
        assert not any(torch.equal(before[name], value) for name, value in eager.items())
        return self.counter.frame_count


def _sgd(model: dcx.ChannelModel, compact: bool) -> torch.optim.Optimizer:
    if compact:
        return dcx.optim.SGD(model, lr=0.05, momentum=0.9)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "plain": (Plain, {"grouped": "equal", "saliency": "sample"}),
    "residual keep": (Residual, {"saliency": "batch"}),
    "residual tie": (Residual, {"residual": "tie", "saliency": "sample"}),
    "residual union": (Residual, {"residual": "union", "saliency": "batch"}),
    "dense": (Dense, {"saliency": "sample"}),
    "shuffle": (Shuffle, {"saliency": "batch"}),
}
TRAINING_AND_EVALUATION = 2


@pytest.mark.parametrize("case", ["residual union", "shuffle"])
def test_one_graph_serves_changing_sets(case: str) -> None:
    network, options = CASES[case]
    assert Twins(network, **options).train(steps=6) == TRAINING_AND_EVALUATION


def test_micro_batches_add_up() -> None:
    """The second one is smaller, so that it is compiled while leaves have gradients already."""
    network, options = CASES["plain"]
    twins = Twins(network, **options)
    assert twins.train(steps=4, micro_batches=2) == 1 + TRAINING_AND_EVALUATION


def test_sets_need_not_be_tensors_of_their_own() -> None:
    """Selectors give views of one list; a user may give one set to several groups."""
    network, options = CASES["dense"]
    twins = Twins(network, compact=False, **options)
    both = torch.tensor([0, 1, 3, 0, 2])
    first = dcx.ChannelSet.trusted(both[:3], 5), dcx.ChannelSet.trusted(both[3:], 4)
    same = torch.tensor([1, 3])
    second = dcx.ChannelSet.trusted(same, 5), dcx.ChannelSet.trusted(same, 4)
    third = dcx.ChannelSet.trusted(both[3:], 5), dcx.ChannelSet.trusted(both[:3], 4)
    for sets in (first, second, third):
        twins.step(dict(zip(twins.models[0].active, sets, strict=True)))
    assert twins.counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_fifty_sets_in_one_graph(case: str, compact: bool) -> None:
    network, options = CASES[case]
    assert Twins(network, compact=compact, **options).train(steps=50) == TRAINING_AND_EVALUATION


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("case", "compact"), [("residual union", True), ("dense", False)])
def test_inductor_serves_fifty_sets(case: str, compact: bool) -> None:
    network, options = CASES[case]
    twins = Twins(network, "inductor", compact, **options)
    assert twins.train(steps=50) == TRAINING_AND_EVALUATION

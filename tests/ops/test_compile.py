"""torch.compile: one graph serves every set, a single channel and all of them included."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from channel_helpers import leaf
from dcx_kernels import ChannelSet, channel_batch_norm, channel_conv2d, channel_linear
from tolerances import assert_exact, assert_gradients_close

C, K = 8, 16
CHANGES = 20
# torch 2.11 warns of what it does itself: tracing an autograd.Function, loading inductor
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]
Run = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _conv(x: Tensor, p: dict[str, Tensor], in_: ChannelSet, out: ChannelSet) -> Tensor:
    return channel_conv2d(x, p["weight"], p["bias"], padding=1, in_active=in_, out_active=out)


def _norm(x: Tensor, p: dict[str, Tensor], in_: ChannelSet, out: ChannelSet) -> Tensor:
    return channel_batch_norm(
        _conv(x, p, in_, out), p["mean"], p["var"], p["gamma"], p["beta"], True,
        active=out, relu=True,
    )  # fmt: skip


def _network(x: Tensor, p: dict[str, Tensor], in_: ChannelSet, out: ChannelSet) -> Tensor:
    y = channel_conv2d(_norm(x, p, in_, out), p["second"], in_active=out, out_active=in_)
    return channel_linear(y.mean((2, 3)), p["head"], in_active=in_)


FUNCTIONS: dict[str, Run] = {"conv": _conv, "conv-norm": _norm, "network": _network}


def _tensors() -> dict[str, Tensor]:
    trained = {"weight": (K, C, 3, 3), "bias": (K,), "gamma": (K,), "beta": (K,)}
    trained |= {"second": (C, K, 1, 1), "head": (5, C)}
    parameters = {name: torch.randn(shape).requires_grad_() for name, shape in trained.items()}
    return {**parameters, "mean": torch.zeros(K), "var": torch.ones(K)}


def _sets(special: bool) -> list[tuple[ChannelSet, ChannelSet]]:
    """Return sets of many lengths; ``special`` adds those of one channel and of all."""
    chance = random.Random(0)
    inner, outer = ([1, 2, 5, C], [1, 7, 12, K]) if special else ([2, 3, 5], [3, 7, 12, 15])
    return [
        (
            ChannelSet(chance.sample(range(C), chance.choice(inner)), C),
            ChannelSet(chance.sample(range(K), chance.choice(outer)), K),
        )
        for _ in range(CHANGES)
    ]


def _results(
    run: Run, parameters: dict[str, Tensor], x: Tensor, *sets: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    mine = {n: leaf(p, dtype) if p.requires_grad else p.to(dtype) for n, p in parameters.items()}
    x = leaf(x, dtype)
    y = run(x, mine, *sets)
    y.backward(torch.sin(torch.arange(y.numel())).view(y.shape).to(dtype))
    grads = {n: p.grad for n, p in mine.items() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "mean": mine["mean"], "var": mine["var"], **grads}


def _compare(
    name: str,
    backend: str,
    special: bool,
    layout: torch.memory_format,
    dtype: torch.dtype = torch.float64,
) -> int:
    """Compare compiled with eager results for changing sets; return the number of compilations."""
    function, counter = FUNCTIONS[name], CompileCounterWithBackend(backend)
    compiled, parameters = torch.compile(function, backend=counter, fullgraph=True), _tensors()
    for in_, out in _sets(special):
        x = torch.randn(2, C, 6, 5).contiguous(memory_format=layout)
        got = _results(compiled, parameters, x, in_, out, dtype=dtype)
        eager = _results(function, parameters, x, in_, out, dtype=dtype)
        if dtype == torch.float64:
            assert_gradients_close(got, eager)
        else:  # inductor adds up in another order; layouts differ from those of float64
            assert_exact(got["y"], eager["y"])
            assert all(value.isfinite().all() for value in got.values())
    return counter.frame_count


@pytest.mark.parametrize(
    ("name", "special"),
    [("conv", True), ("conv-norm", True), ("network", True), ("network", False)],
)
def test_compiled_operators_serve_changing_sets(name: str, special: bool) -> None:
    assert _compare(name, "aot_eager", special, torch.contiguous_format) == 1


def test_compiled_operators_follow_channels_last() -> None:
    assert _compare("conv-norm", "aot_eager", True, torch.channels_last, torch.float32) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["conv", "conv-norm"])
def test_inductor_serves_changing_sets(
    name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    assert _compare(name, "inductor", True, layout, dtype) == 1


def test_compiled_conv_takes_compact_input_of_any_length() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_conv, backend=counter, fullgraph=True)
    parameters = _tensors()
    for in_, out in _sets(special=False):
        x = torch.randn(2, len(in_), 6, 5)
        assert torch.equal(compiled(x, parameters, in_, out), _conv(x, parameters, in_, out))
    assert counter.frame_count <= 2  # the first one takes the length of x for a constant


def test_sets_made_before_the_compiler_was_needed_still_work() -> None:
    in_, out = _sets(special=False)[0]
    for s in (in_, out):
        vars(s.indices).clear()  # as if made before torch.compile was imported
    parameters, x = _tensors(), torch.randn(2, C, 6, 5)
    compiled = torch.compile(_conv, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, parameters, in_, out), _conv(x, parameters, in_, out))

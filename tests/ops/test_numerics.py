"""What the definition does not show: low precision, fresh memory, reruns, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_helpers import ConvCase, backward, channels, leaf, masked_conv2d
from dcx_kernels import (
    ChannelSet,
    channel_batch_norm,
    channel_conv2d,
    channel_linear,
    gather_channels,
    scatter_channels,
)
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

LOW = [torch.float32, torch.bfloat16, torch.float16]
Run = Callable[..., dict[str, Tensor]]


def _conv(
    case: ConvCase,
) -> tuple[list[Tensor | None], Callable[..., Tensor], Callable[..., Tensor]]:
    in_active, out_active = case.sets()
    options = {**case.options, "groups": case.groups}
    sets = {"in_active": in_active, "out_active": out_active}
    return (
        list(case.tensors(in_active)),
        lambda *t: channel_conv2d(*t, **options, **sets),
        lambda *t: masked_conv2d(*t, in_active, out_active, **options),
    )


def _linear() -> tuple[list[Tensor | None], Callable[..., Tensor], Callable[..., Tensor]]:
    in_active, out_active = channels(17, 63), channels(5, 10)
    columns = in_active.mask().repeat_interleave(4)
    tensors = [torch.randn(s).double() for s in ((3, 252), (10, 252), (10,))]
    return (
        tensors,
        lambda *t: channel_linear(*t, in_active=in_active, out_active=out_active, inner=4),
        lambda x, w, b: F.linear(x * columns, w, b)[:, out_active.indices],
    )


def _norm(
    training: bool, relu: bool = True
) -> tuple[list[Tensor | None], Callable[..., Tensor], Callable[..., Tensor]]:
    active = channels(5, 9)
    idx = active.indices
    mean, var = torch.randn(9), torch.rand(9) + 0.5

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return mean.to(wide), var.to(wide)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return channel_batch_norm(
            x, *statistics(x), w.to(statistics(x)[0].dtype), b.to(statistics(x)[0].dtype), training,
            active=active, relu=relu,
        )  # fmt: skip

    def definition(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        m, v = statistics(x)
        y = F.batch_norm(x, m[idx], v[idx], w.to(m.dtype)[idx], b.to(m.dtype)[idx], training)
        return y.relu() if relu else y

    tensors = [torch.randn(s).double() for s in ((4, 5, 6, 3), (9,), (9,))]
    return tensors, ours, definition


def _problem(name: str) -> tuple[list[Tensor | None], Callable[..., Tensor], Callable[..., Tensor]]:
    convs = {
        "conv": ConvCase("", 63, 17, 17, 5, options={"padding": 1}),
        "conv-channels_last": ConvCase("", 63, 17, 17, 5, layout="channels_last"),
        "conv-compact": ConvCase("", 17, 63, 5, 17, compact=True, options={"stride": 2}),
        "conv-groups": ConvCase("", 6, 9, [1, 2, 5], [0, 3, 8], groups=3, options={"padding": 1}),
        "conv-depthwise": ConvCase("", 17, 17, [0, 3, 16], [0, 3, 16], groups=17),
        "conv-same-even": ConvCase("", 5, 6, 3, 4, kernel=(2, 4), options={"padding": "same"}),
    }
    if name in convs:
        return _conv(convs[name])
    return _linear() if name == "linear" else _norm(name == "norm-train")


PROBLEMS = [
    "conv", "conv-channels_last", "conv-compact", "conv-groups", "conv-depthwise",
    "conv-same-even", "linear", "norm-train", "norm-eval",
]  # fmt: skip


def _results(
    run: Callable[..., Tensor], tensors: list[Tensor | None], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return output and gradients; y is rounded nowhere but in ``dtype``."""
    leaves = [leaf(t, dtype) for t in tensors]
    y = run(*leaves)
    upstream = torch.sin(torch.arange(y.numel())).view(y.shape).bfloat16()
    named = dict(zip(("x", "weight", "bias"), leaves, strict=True))
    return {"y": y.detach(), **backward(y, upstream, named)}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_operators_are_as_accurate_as_torch(problem: str, dtype: torch.dtype) -> None:
    tensors, ours, definition = _problem(problem)
    rounded = [None if t is None else t.to(dtype) for t in tensors]
    got = _results(ours, rounded, dtype)
    same_dtype = _results(definition, rounded, dtype)
    truth = _results(definition, rounded, torch.float64)
    for name, value in got.items():
        assert_close_to_float64(value, same_dtype[name], truth[name], name)


@pytest.fixture
def _poison() -> Iterator[None]:
    """Fill fresh memory with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_operators_read_no_fresh_memory(problem: str) -> None:
    tensors, ours, _ = _problem(problem)
    poisoned = _results(ours, tensors, torch.float32)
    torch.use_deterministic_algorithms(False)
    clean = _results(ours, tensors, torch.float32)
    for name, value in poisoned.items():
        assert value.isfinite().all(), name
        assert_exact(value, clean[name], name)


@pytest.mark.usefixtures("_poison")
def test_moves_read_no_fresh_memory() -> None:
    active = ChannelSet([0, 2, 5], 8)
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    y = scatter_channels(gather_channels(x, active), active)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_operators_rerun_bit_equal(problem: str, dtype: torch.dtype) -> None:
    tensors, ours, _ = _problem(problem)
    assert_reruns_equal(lambda: list(_results(ours, tensors, dtype).values()))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "norm" not in p])
def test_operators_autocast_as_torch(problem: str) -> None:
    tensors, ours, definition = _problem(problem)
    rounded = [None if t is None else t.float() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        got = _results(ours, rounded, torch.float32)
        same = _results(definition, rounded, torch.float32)
    truth = _results(definition, rounded, torch.float64)
    assert got["y"].dtype == torch.bfloat16
    for name, value in got.items():
        assert_close_to_float64(value, same[name], truth[name], name)
    with torch.autocast("cpu", enabled=False):
        assert _results(ours, rounded, torch.float32)["y"].dtype == torch.float32


def test_conv_norm_autocast_as_torch() -> None:
    tensors, conv, masked = _conv(ConvCase("", 7, 9, 4, 5))
    _, ours, definition = _norm(training=True)
    vectors = [torch.randn(9).double(), torch.randn(9).double()]
    x, *parameters = [t.float() for t in (*tensors, *vectors)]

    def results(
        first: Callable[..., Tensor], second: Callable[..., Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        leaves = [leaf(t, dtype) for t in parameters]
        y = second(first(x.to(dtype), *leaves[:2]), *leaves[2:])
        y.backward(torch.sin(torch.arange(y.numel())).view(y.shape).bfloat16().to(y.dtype))
        names = ("weight", "norm.weight", "norm.bias")
        grads = [t.grad for t in (leaves[0], *leaves[2:])]
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    with torch.autocast("cpu", torch.bfloat16):
        got = results(conv, ours, torch.float32)
        same = results(masked, definition, torch.float32)
    truth = results(masked, definition, torch.float64)
    for name, value in got.items():
        assert_close_to_float64(value, same[name], truth[name], name)

"""channel_batch_norm equals F.batch_norm of the active channels, statistics included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_helpers import Wanted, backward, channels, indices_of, leaf, spread
from dcx_kernels import ChannelSet, channel_batch_norm
from tolerances import assert_exact, assert_gradients_close

SETS: dict[str, tuple[int, Wanted]] = {
    "K1": (1, 1),
    "None": (7, None),
    "all": (3, 3),
    "one": (17, 1),
    "some": (17, 5),
    "K63": (63, [0, 1, 30, 62]),
    "K100": (100, 63),
}


def _statistics(num_channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return running mean, running variance, weight and bias."""
    vectors = torch.randn(4, num_channels, dtype=torch.float64)
    return vectors[0], vectors[1].exp(), vectors[2], vectors[3]


def _input(shape: tuple[int, ...], layout: str = "contiguous") -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return spread(x) if layout == "strided" else x


def _compare(
    num_channels: int,
    wanted: Wanted,
    training: bool,
    relu: bool = False,
    layout: str = "contiguous",
    shape: tuple[int, ...] = (4, 5, 3),
    **options: Any,
) -> None:
    active = channels(wanted, num_channels)
    idx = indices_of(active, num_channels)
    mean, var, weight, bias = _statistics(num_channels)
    x = _input((shape[0], len(idx), *shape[1:]), layout)
    mine = {"x": leaf(x), "weight": leaf(weight), "bias": leaf(bias)}
    theirs = {"x": leaf(x), "weight": leaf(weight), "bias": leaf(bias)}
    my_mean, my_var, their_mean, their_var = mean.clone(), var.clone(), mean.clone(), var.clone()
    y = channel_batch_norm(
        mine["x"], my_mean, my_var, mine["weight"], mine["bias"], training,
        active=active, relu=relu, **options,
    )  # fmt: skip
    mean_c, var_c = their_mean[idx], their_var[idx]
    expected = F.batch_norm(
        theirs["x"], mean_c, var_c, theirs["weight"][idx], theirs["bias"][idx], training, **options
    )
    their_mean[idx], their_var[idx] = mean_c, var_c
    expected = expected.relu() if relu else expected
    upstream = torch.randn_like(expected)
    assert_gradients_close({"y": y}, {"y": expected})
    assert_gradients_close(backward(y, upstream, mine), backward(expected, upstream, theirs))
    resting = torch.ones(num_channels, dtype=torch.bool).index_fill(0, idx, False)
    assert mine["weight"].grad[resting].eq(0).all() and mine["bias"].grad[resting].eq(0).all()
    assert_gradients_close({"mean": my_mean, "var": my_var}, {"mean": their_mean, "var": their_var})
    assert_exact(my_mean[resting], mean[resting], "running mean of inactive channels")
    assert_exact(my_var[resting], var[resting], "running variance of inactive channels")
    assert training or torch.equal(my_mean, mean)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_channels", "wanted"), SETS.values(), ids=SETS.keys())
def test_channel_batch_norm_equals_definition(
    num_channels: int, wanted: Wanted, training: bool, relu: bool
) -> None:
    _compare(num_channels, wanted, training, relu)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"momentum": 0.37, "eps": 0.5},
        {"layout": "channels_last"},
        {"layout": "strided"},
        {"shape": (1, 4, 3)},
        {"shape": (5, 1, 1)},
        {"shape": (0, 4, 3)},
        {"shape": (6,)},
        {"shape": (4, 3)},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()).replace(" ", ""),
)
def test_channel_batch_norm_options(options: dict[str, Any], training: bool) -> None:
    _compare(9, 4, training, relu=True, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("present", ["weight", "bias", "neither"])
def test_channel_batch_norm_without_affine(present: str, training: bool) -> None:
    mean, var, weight, bias = _statistics(6)
    x, active = _input((4, 3, 2, 2)), ChannelSet([0, 2, 5], 6)
    w, b = weight if present == "weight" else None, bias if present == "bias" else None
    mine, theirs = leaf(x), leaf(x)
    idx = active.indices
    y = channel_batch_norm(mine, mean.clone(), var.clone(), w, b, training, active=active)
    expected = F.batch_norm(
        theirs, mean[idx], var[idx], None if w is None else w[idx], None if b is None else b[idx],
        training,
    )  # fmt: skip
    upstream = torch.randn_like(expected)
    assert_gradients_close({"y": y}, {"y": expected})
    assert_gradients_close(
        backward(y, upstream, {"x": mine}), backward(expected, upstream, {"x": theirs})
    )


def test_channel_batch_norm_takes_compact_vectors() -> None:
    mean, var, weight, bias = _statistics(6)
    x, active = _input((4, 3, 2, 2)), ChannelSet([0, 2, 5], 6)
    full, compact = [leaf(weight), leaf(bias)], [leaf(v[active.indices]) for v in (weight, bias)]
    y = channel_batch_norm(x, mean.clone(), var.clone(), *full, True, active=active)
    packed = channel_batch_norm(x, mean.clone(), var.clone(), *compact, True, active=active)
    assert_exact(packed, y)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    packed.backward(upstream)
    for small, dense in zip(compact, full, strict=True):
        assert_exact(small.grad, dense.grad[active.indices])


def test_channel_batch_norm_needs_no_running_statistics_in_training() -> None:
    x, active = _input((4, 3, 2, 2)), ChannelSet([0, 2, 5], 6)
    y = channel_batch_norm(x, None, None, training=True, active=active)
    assert_gradients_close({"y": y}, {"y": F.batch_norm(x, None, None, training=True)})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_channel_batch_norm_gradcheck(training: bool, relu: bool) -> None:
    mean, var, weight, bias = _statistics(4)
    active = ChannelSet([1, 3], 4)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return channel_batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, active=active, relu=relu
        )

    inputs = (leaf(_input((3, 2, 2, 1))), leaf(weight), leaf(bias))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_channel_batch_norm_follows_the_input_layout(relu: bool) -> None:
    x = leaf(_input((4, 5, 6, 3), "channels_last"))
    mean, var, weight, bias = _statistics(9)
    active = channels(5, 9)
    y = channel_batch_norm(x, mean, var, weight, bias, True, active=active, relu=relu)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_channel_batch_norm_backward_uses_its_own_sets() -> None:
    mean, var, weight, bias = _statistics(6)
    mine, theirs = [leaf(weight), leaf(bias)], [leaf(weight), leaf(bias)]
    results = []
    for chosen in ([0, 3], [1, 2, 5], [3]):
        active, x = ChannelSet(chosen, 6), _input((3, len(chosen), 2, 2))
        y = channel_batch_norm(x, mean.clone(), var.clone(), *mine, True, active=active)
        compact = [v[active.indices] for v in theirs]
        results.append((y, F.batch_norm(x, None, None, *compact, training=True)))
    for y, expected in results:
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
    assert_gradients_close(
        {"weight": mine[0].grad, "bias": mine[1].grad},
        {"weight": theirs[0].grad, "bias": theirs[1].grad},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (4, 6, 2, 2)}, r"x: expected x with 3 channels, got \(4, 6, 2, 2\)"),
        ({"x": (3,)}, r"x: expected x with 3 channels, got \(3,\)"),
        ({"training": False, "mean": None}, "running statistics in evaluation, got None"),
        ({"training": False, "var": None}, "running statistics in evaluation, got None"),
        (
            {"x": (1, 3, 1, 1)},
            r"more than 1 value per channel when training, got input size \(1, 3, 1, 1\)",
        ),
        ({"weight": 5}, r"weight: expected 3 \(compact\) or 6 \(full\) values, got \(5,\)"),
        ({"bias": 7}, r"bias: expected 3 \(compact\) or 6 \(full\) values, got \(7,\)"),
        ({"mean": 3}, r"running_mean: expected 6 values, got \(3,\)"),
        ({"var": 7}, r"running_var: expected 6 values, got \(7,\)"),
    ],
)
def test_channel_batch_norm_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "x": (4, 3, 2, 2), "mean": 6, "var": 6, "weight": 6, "bias": 6, "training": True, **changes
    }  # fmt: skip
    vectors = [
        None if arguments[n] is None else torch.ones(arguments[n])
        for n in ("mean", "var", "weight", "bias")
    ]
    x, active = torch.randn(arguments["x"]), ChannelSet([0, 2, 5], 6)
    with pytest.raises(ValueError, match=message):
        channel_batch_norm(x, *vectors, arguments["training"], active=active)

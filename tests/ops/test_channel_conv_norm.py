"""Fused convolution, norm and ReLU equal `channel_conv2d` and `channel_batch_norm`, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from channel_helpers import channels, leaf
from dcx_kernels import channel_batch_norm, channel_conv2d
from dcx_kernels.kernels.norm import Norm
from dcx_kernels.ops.channel_conv_norm import (
    BatchNorm,
    Conv2d,
    channel_conv_norm,
    norm_act,
    norm_conv2d,
)
from tolerances import assert_close_to_float64, assert_gradients_close

LAST = torch.channels_last


class Chain:
    """Three convolutions of 4 -> 7 -> 6 -> 5 channels, some active, a norm behind the first two.

    ``raw``: the first norm is left to the second convolution, the second one to the third.
    """

    def __init__(
        self,
        training: bool = True,
        relu: bool = True,
        packed: bool = False,
        probe: str | None = None,
        dtype: torch.dtype = torch.float64,
        batch: int = 3,
        layout: torch.memory_format = torch.contiguous_format,
        groups: int = 1,
    ) -> None:
        sizes = (4, 7, 6, 5) if groups == 1 else (4, 8, 8, 4)
        wanted = (None, [0, 2, 3, 6], [1, 4], [0, 3, 4]) if groups == 1 else (None,) * 4
        self.sets = [channels(w, size) for w, size in zip(wanted, sizes, strict=True)]
        self.training, self.relu, self.packed = training, relu, packed
        counts = [n if s is None else len(s) for s, n in zip(self.sets, sizes, strict=True)]
        widths = counts if packed else sizes
        x = torch.randn(batch, counts[0], 7, 6, dtype=torch.float64)
        self.leaves: dict[str, Tensor] = {"x": leaf(x.to(dtype).contiguous(memory_format=layout))}
        self.statistics: dict[str, Tensor] = {}
        self.probes: list[Tensor | None] = [None] * 3
        self.options: list[dict[str, Any]] = [
            {"stride": 1, "padding": 1, "groups": groups},
            {"stride": (2, 1), "padding": (1, 2), "groups": groups},
            {"dilation": 2, "padding": 1, "groups": groups},
        ]
        for i in range(3):
            c, k = widths[i] // groups, widths[i + 1]
            self._make(f"weight{i}", torch.randn(k, c, 3, 3), dtype)
            self._make(f"bias{i}", torch.randn(k), dtype)
            if i < 2:
                self._make(f"gamma{i}", torch.randn(k), dtype)
                self._make(f"beta{i}", torch.randn(k), dtype)
                self.statistics[f"mean{i}"] = torch.randn(sizes[i + 1], dtype=dtype)
                self.statistics[f"var{i}"] = torch.rand(sizes[i + 1], dtype=dtype) + 0.5
            if probe is not None:
                count = counts[i + 1]
                shape = (batch, count) if probe == "sample" else (count,)
                self.probes[i] = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
                self.leaves[f"probe{i}"] = self.probes[i].requires_grad_()

    def _make(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        self.leaves[name] = value.to(dtype).requires_grad_()

    def conv(self, i: int, probe: bool = False) -> Conv2d:
        in_, out = self.sets[i], self.sets[i + 1]
        return Conv2d(
            self.leaves[f"weight{i}"], self.leaves[f"bias{i}"], **self.options[i], in_active=in_,
            out_active=out, packed=self.packed, probe=self.probes[i] if probe else None,
        )  # fmt: skip

    def norm(self, i: int) -> BatchNorm:
        mean, var = self.statistics[f"mean{i}"], self.statistics[f"var{i}"]
        gamma, beta = self.leaves[f"gamma{i}"], self.leaves[f"beta{i}"]
        return BatchNorm(
            mean, var, gamma, beta, self.training, 0.3, 1e-3, self.sets[i + 1], self.relu,
            self.probes[i],
        )  # fmt: skip

    def unfused(self) -> Tensor:
        z = self.leaves["x"]
        for i in range(3):
            z = channel_conv2d(z, **self.conv(i, probe=i == 2)._asdict())
            if i < 2:
                z = channel_batch_norm(z, **self.norm(i)._asdict())
        return z

    def fused(self, raw: bool = True) -> Tensor:
        y, norm = channel_conv_norm(self.leaves["x"], None, self.conv(0), self.norm(0), raw)
        y, norm = channel_conv_norm(y, norm, self.conv(1), self.norm(1), raw)
        if norm is not None:
            return norm_conv2d(y, norm, self.conv(2, probe=True))
        return channel_conv2d(y, **self.conv(2, probe=True)._asdict())

    def results(self, run: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return output, gradients (the saliency is that of a probe) and running statistics."""
        before = {name: value.clone() for name, value in self.statistics.items()}
        y = run()
        generator = torch.Generator().manual_seed(5)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        grads = torch.autograd.grad(y, list(self.leaves.values()), dy)
        seen = {"y": y.detach(), **dict(zip(self.leaves, grads, strict=True))}
        seen |= {name: value.clone() for name, value in self.statistics.items()}
        for name, value in before.items():
            assert torch.equal(self.statistics[name], value) != self.training
            self.statistics[name].copy_(value)
        return seen


def _compare(chain: Chain, raw: bool) -> None:
    fused = chain.results(lambda: chain.fused(raw))
    assert_gradients_close(fused, chain.results(chain.unfused))


RAW = pytest.mark.parametrize("raw", [True, False], ids=["raw", "stored"])


@RAW
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("probe", [None, "batch", "sample"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "full"])
def test_fused_equals_unfused(packed: bool, probe: str | None, training: bool, raw: bool) -> None:
    _compare(Chain(training, packed=packed, probe=probe), raw)


@RAW
@pytest.mark.parametrize(
    "options", [{"batch": 1}, {"layout": LAST}, {"groups": 2}, {"groups": 4}], ids=str
)
def test_shapes_and_layouts(options: dict[str, Any], raw: bool) -> None:
    _compare(Chain(probe="sample", **options), raw)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("probe", ["batch", "sample"])
def test_without_relu_it_is_stored(probe: str, training: bool) -> None:
    _compare(Chain(training, relu=False, probe=probe), raw=False)
    with pytest.raises(ValueError, match="a norm with ReLU"):
        Chain(relu=False).fused(raw=True)


@pytest.mark.parametrize("probe", [None, "batch", "sample"])
def test_two_readers_and_one_that_stores(probe: str | None) -> None:
    """What several readers hand back adds up."""
    chain = Chain(probe=probe)
    second = Conv2d(torch.randn(3, 4, 1, 1, dtype=torch.float64), None)

    x = chain.leaves["x"]

    def fused() -> Tensor:
        y, norm = channel_conv_norm(x, None, chain.conv(0), chain.norm(0), True)
        both = norm_conv2d(y, norm, chain.conv(1)).sum() + norm_conv2d(y, norm, second).square()
        return both.sum() + norm_act(y, norm).pow(3).sum()

    def unfused() -> Tensor:
        y = channel_conv2d(x, **chain.conv(0)._asdict())
        z = channel_batch_norm(y, **chain.norm(0)._asdict())
        both = channel_conv2d(z, **chain.conv(1)._asdict()).sum()
        return (both + channel_conv2d(z, **second._asdict()).square()).sum() + z.pow(3).sum()

    for name in ("mean1", "var1", *[n for n in chain.leaves if n[-1] == "2"], "gamma1", "beta1"):
        chain.leaves.pop(name, None), chain.statistics.pop(name, None)
    chain.leaves.pop("probe1", None)
    assert_gradients_close(chain.results(fused), chain.results(unfused))


@RAW
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(training: bool, raw: bool) -> None:
    """Of the composition: alone, shift's gradient stands for that through the mean, too."""
    chain = Chain(training, batch=2)
    inputs = list(chain.leaves.values())
    keep = {name: value.clone() for name, value in chain.statistics.items()}

    def run(*_: Tensor) -> Tensor:
        for name, value in keep.items():
            chain.statistics[name].copy_(value)
        return chain.fused(raw)

    assert torch.autograd.gradcheck(run, tuple(inputs), fast_mode=True)


@RAW
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_parameters_change_nothing(training: bool, raw: bool) -> None:
    chain = Chain(training, probe="batch")
    wanted = chain.results(chain.unfused)
    every, frozen = dict(chain.leaves), ("weight0", "bias1", "gamma0", "beta1", "x")
    for name in frozen:
        every[name].requires_grad_(False)
    y = chain.fused(raw)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y.backward(dy)
    got = {name: value.grad for name, value in every.items() if name not in frozen}
    assert_gradients_close(got, {name: wanted[name] for name in got})
    assert all(every[name].grad is None for name in frozen)


@RAW
@pytest.mark.parametrize("present", ["gamma", "beta", "neither"])
def test_norms_without_weight_or_bias(present: str, raw: bool) -> None:
    chain = Chain(probe="batch")
    full = chain.norm

    def norm(i: int) -> BatchNorm:
        weight = full(i).weight if present == "gamma" else None
        return full(i)._replace(weight=weight, bias=full(i).bias if present == "beta" else None)

    chain.norm = norm  # type: ignore[method-assign]
    hidden = {name: value for name, value in chain.leaves.items() if name[:-1] in ("gamma", "beta")}
    kept = {name: value for name, value in hidden.items() if name[:-1] == present}
    used = {n: v for n, v in chain.leaves.items() if n not in hidden or n in kept}

    def results(run: Callable[[], Tensor]) -> dict[str, Tensor]:
        y = run()
        dy = torch.ones_like(y) * 0.7
        grads = torch.autograd.grad(y.square(), list(used.values()), dy)
        return {"y": y.detach(), **dict(zip(used, grads, strict=True))}

    assert_gradients_close(results(lambda: chain.fused(raw)), results(chain.unfused))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_good_as_unfused(dtype: torch.dtype) -> None:
    chains = []
    for kind in (dtype, torch.float64):
        torch.manual_seed(7)
        chains.append(Chain(dtype=kind))
    low, truth = chains
    for name, value in low.leaves.items():
        truth.leaves[name].data.copy_(value.data)
    for name, statistic in low.statistics.items():
        truth.statistics[name].copy_(statistic)
    y, own = low.results(low.fused), low.results(low.unfused)
    wanted = truth.results(truth.unfused)
    for name in ("y", "mean0", "var0"):
        assert_close_to_float64(y[name], own[name], wanted[name], name)
    assert {name: t.dtype for name, t in y.items()} == {name: t.dtype for name, t in own.items()}
    for name, gradient in y.items():
        error, bound = ((t.double() - wanted[name]).norm() for t in (gradient, own[name]))
        rounding = torch.finfo(dtype).eps * wanted[name].norm()
        assert error <= 2 * bound + rounding or name.startswith("bias"), name


def test_autocast_computes_in_its_dtype() -> None:
    chain = Chain(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, norm = channel_conv_norm(chain.leaves["x"], None, chain.conv(0), chain.norm(0), True)
        out = norm_conv2d(y, norm, chain.conv(1))
        stored = channel_conv_norm(chain.leaves["x"], None, chain.conv(0), chain.norm(0))[0]
    assert y.dtype == out.dtype == stored.dtype == torch.bfloat16
    assert {vector.dtype for vector in norm} == {torch.float32}
    names = ("weight0", "bias0", "gamma0", "beta0", "weight1", "x")
    grads = torch.autograd.grad(out.float().sum(), [chain.leaves[name] for name in names])
    assert {gradient.dtype for gradient in grads} == {torch.float32}


def test_less_is_saved_for_backward() -> None:
    chain = Chain(batch=4, probe="batch")

    def saved(run: Callable[[], Tensor]) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(seen.values())

    activations = 4 * (4 * 7 * 6 + 2 * 4 * 8) * 8  # the two activated tensors
    less = saved(chain.unfused) - saved(lambda: chain.fused(True))
    assert activations * 0.8 < less


# --- errors ---------------------------------------------------------------------------------------


def test_errors() -> None:
    chain = Chain()
    x, conv, norm = chain.leaves["x"], chain.conv(0), chain.norm(0)
    with pytest.raises(ValueError, match="running statistics in evaluation"):
        channel_conv_norm(x, None, conv, norm._replace(running_mean=None, training=False))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        channel_conv_norm(x[:1, :, :1, :1], None, conv, norm)
    with pytest.raises(ValueError, match="expected 4 channels"):
        channel_conv_norm(x, None, conv._replace(out_active=chain.sets[2]), norm)
    for name in ("running_mean", "running_var", "weight", "bias"):
        with pytest.raises(ValueError, match=rf"{name}: expected"):
            channel_conv_norm(x, None, conv, norm._replace(**{name: torch.ones(3)}))
    with pytest.raises(ValueError, match="input channels"):
        channel_conv_norm(x[:, :2], None, conv._replace(in_active=channels([0], 4)), norm)
    y, behind = channel_conv_norm(x, None, conv, norm, True)
    with pytest.raises(ValueError, match="compact x of 4 channels"):
        norm_conv2d(y[:, :3], behind, chain.conv(1))
    with pytest.raises(ValueError, match="compact x of 4 channels"):
        norm_conv2d(y, Norm(*(vector[:3] for vector in behind)), chain.conv(1))


@RAW
def test_flops_are_those_of_unfused(raw: bool) -> None:
    chain = Chain()
    counts = []
    for run in (lambda: chain.fused(raw), chain.unfused):
        with FlopCounterMode(display=False) as forward:
            y = run()
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] and min(counts[0]) > 0

"""Forward and dgrad of the convolution kernel, plain, per sample and fused, against the reference.

Operands are small integers and simple fractions: every product and every sum is exact in float32
(and TF32), whatever the order, so that results must equal those in float64 to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.kernels import reference, tiles
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.reference import sample_convolution
from dcx_kernels.kernels.triton import convolution
from dcx_kernels.kernels.triton._geometry import Axis, dgrad_axes, fwd_axis
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

LAST, FIRST = torch.channels_last, torch.contiguous_format
FP32, FP64 = torch.float32, torch.float64


class Case(NamedTuple):
    """A convolution; ``kept``: which share of the channels its lists name (1: packed weights)."""

    n: int
    c: int
    k: int
    size: tuple[int, int]
    taps: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    kept: float = 0.5

    def __str__(self) -> str:
        size = "x".join(map(str, self.size + self.taps))
        steps = f"s{self.stride[0]}{self.stride[1]}p{self.padding[0]}d{self.dilation[0]}"
        return f"N{self.n}-C{self.c}-K{self.k}-{size}-{steps}-g{self.groups}-d{self.kept}"

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation


CASES = [
    Case(2, 6, 10, (7, 6)),
    Case(2, 17, 18, (4, 5), kept=1.0),
    Case(1, 1, 1, (5, 5), kept=1.0),
    Case(1, 34, 7, (5, 4), (1, 1), padding=(0, 0)),
    Case(1, 16, 32, (5, 4), kept=1.0),
    Case(1, 6, 3, (9, 8), (3, 3), stride=(2, 2)),
    Case(2, 5, 4, (8, 7), (1, 1), stride=(2, 2), padding=(0, 0)),
    Case(1, 4, 4, (9, 10), (3, 2), stride=(3, 2), padding=(2, 1), dilation=(2, 3)),
    Case(1, 4, 6, (11, 7), (5, 1), stride=(2, 3), padding=(2, 0), dilation=(2, 1), kept=1.0),
    Case(1, 8, 12, (5, 5), groups=2),
    Case(1, 3, 3, (6, 6), groups=3, kept=1.0),
    Case(1, 2, 5, (1, 1), (1, 1), padding=(0, 0), kept=1.0),
]


@pytest.fixture(autouse=True)
def _small_tiles_and_nan() -> Iterator[None]:
    """Use tiles that a small problem has several of; fill what is not written with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with tiles.forced(tiles.Tile(32, 16, 16, 4, 2)):
        yield
    torch.use_deterministic_algorithms(before)


def lists(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Draw index lists with equal counts in each group, of a full weight."""
    if case.kept == 1.0:
        return None, None

    def draw(channels: int) -> Tensor:
        run = channels // case.groups
        kept = max(1, int(run * case.kept))
        runs = [torch.randperm(run)[:kept].sort().values + g * run for g in range(case.groups)]
        return torch.cat(runs)

    return draw(case.c), draw(case.k)


def whole(*shape: int) -> Tensor:
    """Draw small whole numbers, float64."""
    return torch.randint(-3, 4, shape).double()


class Problem:
    """Operands of a case."""

    def __init__(self, case: Case, device: torch.device, form: torch.memory_format) -> None:
        self.case, self.device, self.form = case, device, form
        self.in_idx, self.out_idx = lists(case)
        c = case.c if self.in_idx is None else len(self.in_idx)
        k = case.k if self.out_idx is None else len(self.out_idx)
        self.x = whole(case.n, c, *case.size)
        full = whole(case.k, case.c // case.groups, *case.taps)
        if self.in_idx is not None and self.out_idx is not None:  # what must not be read
            alive = reference.unpack(
                torch.ones_like(
                    reference.pack(full, self.out_idx, self.in_idx, case.groups, case.groups)
                ),
                full.shape, self.out_idx, self.in_idx, case.groups, case.groups,
            )  # fmt: skip
            full = torch.where(alive == 1, full, torch.nan)
        self.weight, self.bias = full, whole(case.k)
        pixels = [
            fwd_axis(*one).size for one in zip(case.size, case.taps, *case.window, strict=True)
        ]
        self.dy = whole(case.n, k, *pixels)

    def at(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an operand in a dtype, on the device, in the layout."""
        form = self.form if tensor.dim() == 4 and tensor is not self.weight else FIRST
        return tensor.to(self.device, dtype).contiguous(memory_format=form)

    def fwd(self, kernels: Any, dtype: torch.dtype) -> Tensor:
        operands = (self.at(t, dtype) for t in (self.x, self.weight, self.bias))
        y: Tensor = kernels.channel_conv2d_fwd(*operands, *self.rest())
        return y

    def dgrad(self, kernels: Any, dtype: torch.dtype) -> Tensor:
        operands = (self.at(t, dtype) for t in (self.dy, self.x, self.weight))
        dx: Tensor = kernels.channel_conv2d_dgrad(*operands, *self.rest())
        return dx

    def rest(self) -> tuple[Any, ...]:
        idx = (t if t is None else t.to(self.device) for t in (self.in_idx, self.out_idx))
        return *idx, *self.case.window, self.case.groups, self.case.groups


@pytest.mark.parametrize("form", [LAST, FIRST], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_dgrad(case: Case, form: torch.memory_format, device: torch.device) -> None:
    problem = Problem(case, device, form)
    for run in (problem.fwd, problem.dgrad):
        actual = run(convolution, torch.float32)
        assert_exact(actual, run(reference, torch.float64).float())
        assert actual.is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("number", [0, 1, 4, 7, 9])
def test_half_precision_rounds_once(number: int, dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem(CASES[number], device, LAST)
    for run in (problem.fwd, problem.dgrad):
        assert_exact(run(convolution, dtype), run(reference, torch.float64).to(dtype))


def test_real_numbers(device: torch.device) -> None:
    x, weight = torch.randn(2, 6, 5, 4, device=device), torch.randn(5, 6, 3, 3, device=device)
    rest = (None, None, [1, 1], [1, 1], [1, 1], 1, 1)
    y, torchs = (
        kernels.channel_conv2d_fwd(x, weight, None, *rest) for kernels in (convolution, reference)
    )
    truth = reference.channel_conv2d_fwd(x.double(), weight.double(), None, *rest)
    assert_close_to_float64(y, torchs, truth)


def test_reads_views_where_they_lie(device: torch.device) -> None:
    x = whole(4, 12, 9, 16).float().to(device)[::2, 1:11:2, 1:8, ::2]
    weight = whole(6, 5, 3, 3).float().to(device)
    rest = (None, None, [1, 1], [1, 1], [1, 1], 1, 1)
    y = convolution.channel_conv2d_fwd(x, weight, None, *rest)
    assert_exact(y, reference.channel_conv2d_fwd(x, weight, None, *rest))
    dy = y.transpose(2, 3).contiguous().transpose(2, 3)
    dx = convolution.channel_conv2d_dgrad(dy, x, weight, *rest)
    assert_exact(dx, reference.channel_conv2d_dgrad(dy, x, weight, *rest))


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)], ids=["no sample", "no channel"])
def test_nothing_to_convolve(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight = torch.randn(shape, device=device), torch.randn(4, shape[1], 3, 3, device=device)
    bias = torch.randn(4, device=device)
    rest = (None, None, [1, 1], [1, 1], [1, 1], 1, 1)
    y = convolution.channel_conv2d_fwd(x, weight, bias, *rest)
    assert torch.equal(y, bias.view(1, 4, 1, 1).expand(shape[0], 4, 5, 5))
    assert convolution.channel_conv2d_dgrad(y, x, weight, *rest).shape == x.shape


def test_reruns_are_bit_equal(device: torch.device) -> None:
    x, weight = torch.randn(2, 4, 5, 4, device=device), torch.randn(3, 4, 3, 3, device=device)
    rest = (None, None, [1, 1], [1, 1], [1, 1], 1, 1)
    assert_reruns_equal(lambda: convolution.channel_conv2d_fwd(x, weight, None, *rest))
    by = norm(4, device)
    dy = torch.randn(2, 3, 5, 4, device=device)
    args = (dy, None, x, by, weight, *rest, False)
    assert_reruns_equal(lambda: convolution.fused_conv2d_dgrad(*args))


# --- every sample its own channels ----------------------------------------------------------------


@pytest.mark.parametrize("which", ["both", "in", "out"])
@pytest.mark.parametrize("stride", [1, 2])
def test_per_sample_sets(stride: int, which: str, device: torch.device) -> None:
    n, c, k, full_c, full_k = 3, 5, 7, 9, 18
    in_idx = torch.stack([torch.randperm(full_c)[:c].sort().values for _ in range(n)]).to(device)
    out_idx = torch.stack([torch.randperm(full_k)[:k].sort().values for _ in range(n)]).to(device)
    in_, out = (in_idx if which != "out" else None), (out_idx if which != "in" else None)
    x = whole(n, c if in_ is not None else full_c, 5, 6).float().to(device)
    x = x.contiguous(memory_format=LAST)
    weight, bias = (t.float().to(device) for t in (whole(full_k, full_c, 3, 3), whole(full_k)))
    rest = (in_, out, [stride] * 2, [1, 1], [1, 1])
    y = convolution.sample_conv2d_fwd(x, weight, bias, *rest)
    assert_exact(y, sample_convolution.sample_conv2d_fwd(x, weight, bias, *rest))
    dy = whole(*y.shape).float().to(device)
    dx = convolution.sample_conv2d_dgrad(dy, x, weight, *rest)
    assert_exact(dx, sample_convolution.sample_conv2d_dgrad(dy, x, weight, *rest))


# --- fused with the norms around ------------------------------------------------------------------

FUSED = [
    Case(2, 17, 18, (4, 5), kept=1.0),
    Case(3, 6, 10, (6, 5), stride=(2, 1)),
    Case(2, 8, 12, (4, 4), groups=2),
]


def norm(channels: int, device: torch.device) -> Norm:
    """Draw a norm; a padded zero would not stay zero behind it."""
    scale = 2.0 ** torch.randint(-1, 2, (channels,))
    vectors = (scale, whole(channels).float(), whole(channels).float() + 0.5)
    return Norm(*(vector.to(device) for vector in vectors))


def behind(y: Tensor, by: Norm) -> Tensor:
    """Return what goes into the ReLU, float64."""
    scale, center, shift = (v.double().view(1, -1, 1, 1) for v in by)
    return (y.double() - center) * scale + shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_forward(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem(case, device, LAST)
    x, weight, bias = (problem.at(t, dtype) for t in (problem.x, problem.weight, problem.bias))
    by = norm(x.shape[1], device)
    y, mean, m2 = convolution.fused_conv2d_fwd(x, by, weight, bias, *problem.rest(), True)
    z = behind(x, by).relu().to(dtype).double()
    truth = reference.channel_conv2d_fwd(z, weight.double(), bias.double(), *problem.rest())
    assert_exact(y, truth.to(dtype))
    # the statistics are as good as torch's if what they normalise is
    invstd = torch.rsqrt(m2 / (y.numel() // y.shape[1]) + 1e-5)
    normalised = (y.float() - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
    torchs, exact = (F.batch_norm(y.to(t), None, None, training=True) for t in (FP32, FP64))
    assert_close_to_float64(normalised, torchs, exact, "normalised by the statistics")


def test_statistics_of_large_means(device: torch.device) -> None:
    x = (torch.randn(4, 3, 6, 6) + 1e4).to(device)
    weight = torch.eye(3, device=device).view(3, 3, 1, 1)
    rest = (None, None, [1, 1], [0, 0], [1, 1], 1, 1)
    y, _, m2 = convolution.fused_conv2d_fwd(x, None, weight, None, *rest, True)
    var = torch.var(y.double(), (0, 2, 3), correction=0)
    # float32 tells such numbers apart by 1e-3; the mean of squares would lose all of the variance
    assert torch.allclose(m2.double() / (4 * 36), var, rtol=1e-3)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("way", ["plain", "before", "behind", "behind relu"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(FUSED[0], torch.float32), (FUSED[1], torch.bfloat16), (FUSED[2], torch.float32)],
    ids=["N2-C17-K18-fp32", "N3-C6-K10-s21-bf16", "N2-C8-K12-g2-fp32"],
)
def test_fused_dgrad(
    case: Case, dtype: torch.dtype, way: str, per_sample: bool, device: torch.device
) -> None:
    problem = Problem(case, device, LAST)
    dy, x, weight = (problem.at(t, dtype) for t in (problem.dy, problem.x, problem.weight))
    by, of_y = norm(x.shape[1], device), norm(dy.shape[1], device)
    y = problem.at(whole(*dy.shape), dtype)
    slope, offset = (whole(dy.shape[1]).float().to(device) / 2 for _ in range(2))
    grad, before = None, dy.double()
    if way != "plain":
        relu, direct = way == "behind relu", way == "before"
        grad = NormGrad(y, of_y.center, slope, offset, None if direct else of_y, relu)
        if not direct:
            before = torch.where(behind(y, of_y) > 0, before, 0) if relu else before
            before = before * _wide(of_y.scale)
        before = before + (y.double() - _wide(of_y.center)) * _wide(slope) + _wide(offset)
    args = (weight, *problem.rest(), per_sample)
    dx, dscale, dshift = convolution.fused_conv2d_dgrad(dy, grad, x, by, *args)
    rounded = before.to(dtype).double()  # as an operand of the product is
    dz = reference.channel_conv2d_dgrad(rounded, x.double(), weight.double(), *problem.rest())
    dh = torch.where(behind(x, by) > 0, dz, 0)
    over = (2, 3) if per_sample else (0, 2, 3)
    assert_exact(dx, (dh * _wide(by.scale)).to(dtype), "dx")
    assert_exact(dscale, (dh * (x.double() - _wide(by.center))).sum(over).float(), "dscale")
    assert_exact(dshift, dh.sum(over).float(), "dshift")


def _wide(vector: Tensor) -> Tensor:
    return vector.double().view(1, -1, 1, 1)


# --- which pixels meet which taps -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 10])
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_axes_meet_every_pair_once(size: int, taps: int, stride: int, dilation: int) -> None:
    padding = dilation * (taps - 1)  # the most that makes sense

    def pairs(axis: Axis, sources: int) -> list[tuple[int, int, int]]:
        """List (output pixel, source pixel, filter row) inside of the source."""
        found = []
        for i in range(axis.size):
            for t in range(axis.taps):
                source = i * axis.src_stride + axis.base + t * axis.tap_step
                if 0 <= source < sources:
                    output = i * axis.out_stride + axis.out_offset
                    found.append((output, source, axis.first + t * axis.step))
        return found

    forward = fwd_axis(size, taps, stride, padding, dilation)
    assert forward.size > 0
    brute = [
        (p, p * stride - padding + r * dilation, r)
        for p in range(forward.size)
        for r in range(taps)
        if 0 <= p * stride - padding + r * dilation < size
    ]
    assert sorted(pairs(forward, size)) == sorted(brute)
    backward = [
        pair
        for axis in dgrad_axes(size, taps, stride, padding, dilation)
        for pair in pairs(axis, forward.size)
    ]
    assert sorted((source, output, r) for output, source, r in backward) == sorted(brute)

"""Moments and sums in two levels equal float64's, for any cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dcx_kernels.kernels.triton import _walk as module
from dcx_kernels.kernels.triton._walk import fold, plan, stride_in, walk
from dcx_kernels.kernels.triton.moments import (
    finish_moments,
    finish_statistics,
    moments,
    sum_partials,
)
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

SHAPES = {
    "odd": (2, 37, 5, 3),
    "folded": (4, 17, 8, 4),
    "vectors": (2, 64, 4, 8),
    "one-channel": (3, 1, 5, 5),
    "few": (8, 3, 4, 4),
    "one-row": (1, 5, 1, 1),
    "line": (3, 17, 6),
    "matrix": (9, 63),
    "cube": (2, 3, 2, 3, 4),
    "many-rows": (3, 2, 19, 23),
}
FORMS = ["contiguous", "channels_last", "slice", "transposed", "offset"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _in_form(x: Tensor, form: str) -> Tensor:
    """Return the same values in another layout, between NaN that must not be read."""
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if form == "slice":
        wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
        if x.dim() == 4:
            wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, :-3] = x
        return wide[:, :-3]
    if form == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if form == "offset":  # its memory begins at an odd address
        wide = x.new_full((x.numel() + 1,), float("nan"))
        wide[1:] = x.flatten()
        return wide[1:].view(x.shape)
    return x


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def _moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = _by_channel(x)
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().sum(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_moments_equal_float64(shape: tuple[int, ...], form: str, device: torch.device) -> None:
    x = (torch.randn(shape) * 2 + 3).to(device)
    actual = finish_moments(*moments(_in_form(x, form)))
    for name, *values in zip(
        ("mean", "m2"), actual, _moments_of(x), _moments_of(x.double()), strict=True
    ):
        assert_close_to_float64(*values, name)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_moments_of_every_dtype(dtype: torch.dtype, form: str, device: torch.device) -> None:
    x = _in_form((torch.randn(2, 37, 4, 3) * 2 + 3).to(device, dtype), form)
    partial, rows, block = moments(x)
    assert partial.dtype == torch.float32 and partial.shape[1:] == (2, 37) and rows == 24
    actual = finish_moments(partial, rows, block)
    for name, *values in zip(
        ("mean", "m2"), actual, _moments_of(x.float()), _moments_of(x.double()), strict=True
    ):
        assert_close_to_float64(*values, name)


@pytest.mark.parametrize("form", FORMS[:2])
def test_partials_of_tiles_in_order(form: str, device: torch.device) -> None:
    """The format that convolutions write as well: t of rows [t * block, (t + 1) * block)."""
    x = _in_form(torch.randn(5, 9, 24, 10).to(device), form)  # nothing to fold
    x = x[:, :7]
    partial, rows, block = moments(x)
    assert rows == 1200 and partial.shape == (-(-rows // block), 2, 7) and len(partial) > 1
    for t, (mean, m2) in enumerate(partial):
        tile = _by_channel(x)[:, t * block : (t + 1) * block]
        assert_close_to_float64(mean, tile.mean(1), tile.double().mean(1), f"mean {t}")
        assert_close_to_float64(m2, _squares(tile), _squares(tile.double()), f"m2 {t}")


def _squares(rows: Tensor) -> Tensor:
    return (rows - rows.mean(1, keepdim=True)).square().sum(1)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("shape", [(4, 17, 8, 4), (2, 5, 19, 23)], ids=["folded", "loop"])
def test_large_mean(shape: tuple[int, ...], form: str, device: torch.device) -> None:
    x = _in_form((torch.randn(shape) + 1e4).to(device), form)
    mean, m2 = finish_moments(*moments(x))
    true_mean, true_m2 = _moments_of(x.double())
    # a float32 at 1e4 is good to 5e-4, so is the mean of a tile; squaring would give nonsense
    assert (mean.double() - true_mean).abs().max() <= 2 * 2**-11
    assert ((m2.double() / true_m2) - 1).abs().max() < 1e-3
    start = moments(_in_form(torch.cat([torch.zeros_like(x[:1]), x]), form))  # far from the rest
    mean, m2 = finish_moments(*start)
    rows = torch.cat([torch.zeros_like(x[:1]), x]).double()
    assert ((m2.double() / _moments_of(rows)[1]) - 1).abs().max() < 1e-5


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a program go over many tiles, as it does in large tensors."""
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["near", "far"])
@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("channels", [3, 8], ids=lambda channels: f"k{channels}")
def test_many_tiles_a_program(channels: int, form: str, shift: float, device: torch.device) -> None:
    x = torch.randn(9, channels, 19, 23) + torch.arange(9.0).view(9, 1, 1, 1)  # means drift
    x = _in_form((x + shift).to(device), form)
    partial, rows, block = moments(x)
    assert rows == 9 * 19 * 23 and len(partial) == -(-rows // block)
    mean, m2 = finish_moments(partial, rows, block)
    true_mean, true_m2 = _moments_of(x.double())
    if shift:
        assert (mean.double() - true_mean).abs().max() <= 2 * 2**-11
        assert ((m2.double() / true_m2) - 1).abs().max() < 1e-3
    else:
        assert torch.allclose(mean.double(), true_mean, rtol=1e-6)
        assert torch.allclose(m2.double(), true_m2, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 1000], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("block", [1, 3, 64], ids=lambda block: f"block{block}")
def test_finish_takes_any_block(rows: int, block: int, device: torch.device) -> None:
    x = (torch.randn(rows, 19) * 3 + 50).to(device)
    partial = torch.stack([torch.stack(_moments_of(tile)) for tile in x.split(block)])
    counts = torch.tensor([len(tile) for tile in x.split(block)], device=device)[:, None]
    actual = finish_moments(partial, rows, block)
    same, truth = _combined(partial, counts), _combined(partial.double(), counts)
    for name, *values in zip(("mean", "m2"), actual, same, truth, strict=True):
        assert_close_to_float64(*values, name)


def _combined(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    means, m2 = partial.unbind(1)
    mean = (counts * means).sum(0) / counts.sum()
    return mean, (m2 + counts * (means - mean).square()).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wanted", [None, [1, 4, 5, 18]], ids=["all", "some"])
def test_statistics_update_active_entries(
    wanted: list[int] | None, dtype: torch.dtype, device: torch.device
) -> None:
    active = None if wanted is None else torch.tensor(wanted, device=device)
    idx = torch.arange(20, device=device) if active is None else active
    x = (torch.randn(5, len(idx), 3, 3) * 2 + 1).to(device)
    stored = torch.randn(20).to(device, dtype), torch.randn(20).exp().to(device, dtype)
    mine = [vector.clone() for vector in stored]
    mean, invstd = finish_statistics(*moments(x), *mine, active, 0.3, 1e-3)
    results: list[list[Tensor]] = []
    for compute in (torch.float32, torch.float64):
        kept = [vector.to(compute)[idx] for vector in stored]
        _, m, s = torch.native_batch_norm(x.to(compute), None, None, *kept, True, 0.3, 1e-3)
        results.append([m, s, *kept])
    own, true = results
    assert_close_to_float64(mean, own[0], true[0], "mean")
    assert_close_to_float64(invstd, own[1], true[1], "invstd")
    for vector, before, same, truth in zip(mine, stored, own[2:], true[2:], strict=True):
        assert_close_to_float64(vector[idx], same.to(dtype), truth, "running")
        resting = torch.ones(20, dtype=torch.bool, device=device).index_fill(0, idx, False)
        assert_exact(vector[resting], before[resting], "inactive")


def test_statistics_of_one_row_are_those_of_torch(device: torch.device) -> None:
    x = torch.randn(1, 3, 1, 1).to(device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    actual, invstd = finish_statistics(*moments(x), mean, var, None, 0.1, 1e-5)
    same_mean, same_var = torch.zeros(3, device=device), torch.ones(3, device=device)
    _, expected, scale = torch.native_batch_norm(
        x, None, None, same_mean, same_var, True, 0.1, 1e-5
    )
    assert_exact(actual, expected, "mean")
    assert torch.allclose(invstd, scale) and torch.allclose(mean, same_mean)
    assert var.isnan().all() and same_var.isnan().all()


def test_statistics_without_running_ones(device: torch.device) -> None:
    x = torch.randn(4, 3, 2, 2).to(device)
    mean, invstd = finish_statistics(*moments(x), None, None, None, 0.1, 1e-5)
    true = _by_channel(x.double())
    assert torch.allclose(mean.double(), true.mean(1))
    assert torch.allclose(invstd.double(), (true.var(1, correction=0) + 1e-5).rsqrt())


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 5), (3, 7, 2, 33), (2, 130, 1, 3), (0, 3, 2, 5), (2, 3, 2, 0)], ids=str
)
def test_sum_partials(shape: tuple[int, ...], device: torch.device) -> None:
    partial = torch.randn(shape).to(device)
    actual = sum_partials(partial)
    if partial.numel() == 0:
        assert actual.shape == partial.sum(1).shape
    else:
        assert_close_to_float64(actual, partial.sum(1), partial.double().sum(1))


def test_rerun_bit_equal_and_nothing_left_unwritten(device: torch.device) -> None:
    x = torch.randn(2, 37, 5, 4).to(device).contiguous(memory_format=torch.channels_last)

    def run() -> list[Tensor]:
        partial, rows, block = moments(x)
        assert partial.isfinite().all()
        return [partial, *finish_moments(partial, rows, block), sum_partials(partial[None])]

    assert_reruns_equal(run)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory is filled with NaN
    try:
        for result in run():
            assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_walk_copies_only_what_is_in_another_form(device: torch.device) -> None:
    x = torch.randn(2, 8, 3, 4).to(device)
    last = x.contiguous(memory_format=torch.channels_last)
    a, b = walk(last, x).tensors
    assert a.data_ptr() == last.data_ptr() and b.data_ptr() != x.data_ptr()
    assert b.stride() == last.stride()
    found = walk(last[:, :3])
    assert found.tensors[0].data_ptr() == last.data_ptr() and found.strides == (8,)
    found = walk(x[:, :3])
    assert found.tensors[0].data_ptr() == x.data_ptr() and found.strides == (96,)
    assert found.planar and stride_in(x, False) is None and stride_in(last, True) is None
    assert stride_in(x.permute(0, 1, 3, 2), True) is None


def test_folding() -> None:
    assert fold(640, 37, (37,)) == 64 and fold(8, 37, (37, 37)) == 8 and fold(7, 37, (37,)) == 1
    assert fold(640, 160, (160,)) == 2 and fold(640, 64, (64,)) == 1
    assert fold(640, 37, (37, 40)) == 1  # rows of a slice are not side by side
    cut = plan(1, 2**16, 37, 1, (37,), False, True)
    assert cut.times == 64 and cut.aligned and cut.tiles * cut.block == cut.span == 2**10
    cut = plan(1, 64 * 1009 * 8, 37, 1, (37,), False, True)
    assert cut.tiles * cut.block * cut.times == 64 * 1009 * 8 or cut.times == 1

"""The gate's kernel against the reference: bit-equal, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.reference import gate as reference
from dcx_kernels.kernels.triton.gate import k_winners
from tolerances import assert_exact, assert_reruns_equal

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill outputs with what no index and no value is, before they are written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def within(g: Tensor) -> Tensor:
    """Return g as a view of a wider tensor; who reads beside it finds the greatest."""
    n, channels = g.shape
    wide = g.new_full((n + 2, channels + 5), INF)
    wide[1:-1, 2:-3] = g
    return wide[1:-1, 2:-3]


def check(g: Tensor, k: int, device: torch.device) -> None:
    """Compare with the reference."""
    found = k_winners(within(g.to(device)), k)
    for got, truth in zip(found, reference.k_winners(g, k), strict=True):
        assert_exact(got.cpu(), truth)


@pytest.mark.parametrize("strides", ["contiguous", "spread", "transposed", "expanded"])
def test_k_winners_read_any_strides(strides: str, device: torch.device) -> None:
    g = torch.randn(2, 63, device=device)
    views = {
        "contiguous": g,
        "spread": torch.stack([g, torch.full_like(g, INF)], 2).flatten(1)[:, ::2],
        "transposed": g.t().contiguous().t(),
        "expanded": g[:1].expand(2, 63),
    }
    x = views[strides]
    wanted = reference.k_winners(x.contiguous(), 31)
    for got, truth in zip(k_winners(x, 31), wanted, strict=True):
        assert_exact(got, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "channels", "k"),
    [
        (1, 1, 1), (2, 3, 2), (1, 17, 17), (2, 63, 1), (2, 100, 50), (1, 257, 128),
        (1, 1025, 700), (1, 4099, 2050),
    ],
)  # fmt: skip
def test_k_winners_equal_the_reference(
    n: int, channels: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(torch.randn(n, channels).to(dtype), k, device)
    check(torch.randint(-2, 3, (n, channels)).relu().to(dtype), k, device)  # ties


@pytest.mark.parametrize("k", [1, 2, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k_winners_of_numbers_that_are_none(
    k: int, dtype: torch.dtype, device: torch.device
) -> None:
    g = torch.tensor([
        [NAN, -INF, INF, -0.0, 0.0, NAN, INF, -1],
        [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
        [NAN, NAN, -INF, -INF, -NAN, NAN, -INF, NAN],
    ])  # fmt: skip
    check(g.to(dtype), k, device)


def test_k_winners_of_close_numbers(device: torch.device) -> None:
    g = torch.randint(0, 300, (2, 300)).float()
    check(1 + g * 2.0**-23, 137, device)  # they differ in the last bits
    check((g - 150) * 2.0**-149, 137, device)
    check((g - 150).half() * 2.0**-24, 137, device)


def test_k_winners_in_float64_tells_what_float32_cannot(device: torch.device) -> None:
    check(1 + torch.randint(0, 300, (2, 300)).double() * 2.0**-50, 137, device)


def test_k_winners_of_no_samples(device: torch.device) -> None:
    indices, values = k_winners(torch.empty(0, 4, dtype=torch.float16, device=device), 3)
    assert indices.shape == values.shape == (0, 3)
    assert (indices.dtype, values.dtype) == (torch.int64, torch.float16)


def test_k_winners_reruns_are_equal_and_spare_g(device: torch.device) -> None:
    g = torch.randint(0, 5, (4, 100)).float().to(device)
    before = g.clone()
    assert_reruns_equal(lambda: k_winners(g, 41))
    assert_exact(g, before)

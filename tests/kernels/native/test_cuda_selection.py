"""On a GPU: what selects channels agrees with the reference, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native import load
from tolerances import assert_exact, assert_reruns_equal

if (lacking := load("cuda")) is not None:
    pytest.skip(f"the native library of GPUs is {lacking}", allow_module_level=True)

from dcx_kernels.kernels.native.cuda import k_winners, select_channels

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill outputs with what no index is, before they are written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(run: Callable[[], Sequence[Tensor]], wanted: Sequence[Tensor]) -> None:
    """Run twice, the second time so that waiting for the GPU is an error."""
    run()  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, truth in zip(found, wanted, strict=True):
        assert_exact(got.cpu(), truth)
    assert_reruns_equal(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [[1], [3, 17, 63, 100, 1], [2048, 512, 64] * 5, [40000, 25536]], ids=str
)
def test_selection(sizes: list[int], dtype: torch.dtype) -> None:
    total = sum(sizes)
    for scores in (torch.randn(total), torch.randint(-2, 3, (total,)).float()):
        scores[0] = float("nan")
        scores = scores.to(dtype)
        floor = sum(min(2, size) for size in sizes)
        arguments = sizes, floor + (total - floor) // 2, 2
        wanted = reference.select_channels(scores, *arguments)
        check(partial(select_channels, scores.cuda(), *arguments), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "channels", "k"), [(1, 1, 1), (3, 63, 17), (256, 512, 128)])
def test_gate(n: int, channels: int, k: int, dtype: torch.dtype) -> None:
    for g in (torch.randn(n, channels), torch.randint(-2, 3, (n, channels)).relu().float()):
        g[0, 0] = float("nan")
        g = g.to(dtype)
        check(partial(k_winners, g.cuda(), k), reference.k_winners(g, k))

"""The per-sample gate on the emulated GPU against the reference: bit-equal, nothing is computed."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.native.cuda import gate
from dcx_kernels.kernels.reference import gate as reference
from tolerances import assert_exact, assert_reruns_equal

INF, NAN = float("inf"), float("nan")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


@pytest.fixture(autouse=True)
def launches(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the operator of the library emulated; outputs hold what is no index and no value."""
    called: list[str] = []

    def k_winners(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
        called.append("k_winners")
        n, channels = g.shape
        kept = g.clone()
        indices = torch.full((n + 2, k), -7)
        values = torch.full((n + 2, k), -7.0, dtype=g.dtype)
        emulated.k_winners(
            g.data_ptr(), indices[1:-1].data_ptr(), values[1:-1].data_ptr(), *g.stride(), n,
            channels, k, TYPES[g.dtype],
        )  # fmt: skip
        assert_exact(g, kept)
        for out in (indices, values):
            assert (out[[0, -1]] == -7).all()
        return indices[1:-1], values[1:-1]

    monkeypatch.setattr(torch.ops, "dcx_native", SimpleNamespace(k_winners=k_winners))
    monkeypatch.setattr(gate, "_serves", lambda device: True)
    return called


def within(g: Tensor) -> Tensor:
    """Return g as a view of a wider tensor; who reads beside it finds the greatest."""
    n, channels = g.shape
    wide = g.new_full((n + 2, channels + 5), INF)
    wide[1:-1, 2:-3] = g
    return wide[1:-1, 2:-3]


def check(g: Tensor, k: int) -> None:
    """Compare with the reference."""
    for got, truth in zip(gate.k_winners(within(g), k), reference.k_winners(g, k), strict=True):
        assert_exact(got, truth)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "channels", "k"),
    [
        (1, 1, 1), (3, 3, 2), (1, 17, 17), (2, 63, 1), (2, 64, 33), (2, 100, 50), (1, 257, 128),
        (1, 1025, 700), (1, 2100, 1),
    ],
)  # fmt: skip
def test_winners_equal_the_reference(
    n: int, channels: int, k: int, dtype: torch.dtype, launches: list[str]
) -> None:
    check(torch.randn(n, channels).to(dtype), k)
    check(torch.randint(-2, 3, (n, channels)).relu().to(dtype), k)  # ties: zeros of a ReLU
    assert launches == ["k_winners"] * 2


@pytest.mark.parametrize("strides", ["contiguous", "spread", "transposed", "expanded"])
def test_any_strides(strides: str) -> None:
    g = torch.randn(2, 63)
    views = {
        "contiguous": g,
        "spread": torch.stack([g, torch.full_like(g, INF)], 2).flatten(1)[:, ::2],
        "transposed": g.t().contiguous().t(),
        "expanded": g[:1].expand(2, 63),
    }
    x = views[strides]
    wanted = reference.k_winners(x.contiguous(), 31)
    for got, truth in zip(gate.k_winners(x, 31), wanted, strict=True):
        assert_exact(got, truth)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_that_are_none(k: int, dtype: torch.dtype) -> None:
    g = torch.tensor([
        [NAN, -INF, INF, -0.0, 0.0, NAN, INF, -1],
        [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
        [NAN, NAN, -INF, -INF, -NAN, NAN, -INF, NAN],
    ])  # fmt: skip
    check(g.to(dtype), k)


def test_close_numbers() -> None:
    g = torch.randint(0, 300, (2, 300)).float()
    check(1 + g * 2.0**-23, 137)  # they differ in the last bits
    check((g - 150) * 2.0**-149, 137)
    check((g - 150).half() * 2.0**-24, 137)
    check(1 + g.double() * 2.0**-50, 137)  # float32 cannot tell them apart


def test_ties_in_several_turns_of_a_block() -> None:
    check(torch.zeros(1, 2100), 1500)


def test_no_samples_and_no_winners() -> None:
    for n, k in ((0, 3), (2, 0)):
        indices, values = gate.k_winners(torch.zeros(n, 4, dtype=torch.float16), k)
        assert indices.shape == values.shape == (n, k)
        assert (indices.dtype, values.dtype) == (torch.int64, torch.float16)


def test_reruns_are_equal() -> None:
    g = torch.randint(0, 5, (4, 100)).float()
    assert_reruns_equal(lambda: gate.k_winners(g, 41))


def test_what_is_not_on_a_gpu_is_the_references(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    g = torch.randn(2, 9)
    for got, truth in zip(gate.k_winners(g, 4), reference.k_winners(g, 4), strict=True):
        assert_exact(got, truth)
    assert launches == []

"""The operator of the per-sample gate: values, gradients, what it refuses, the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcx_kernels.kernels import backend
from dcx_kernels.kernels.reference import gate
from dcx_kernels.ops.k_winners import k_winners
from tolerances import assert_exact

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_reaches_winners_only(dtype: torch.dtype) -> None:
    g = torch.tensor([[1, 3, 3, 2], [0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    indices, values = k_winners(g, 2)
    assert_exact(indices, torch.tensor([[1, 2], [0, 1]]))
    assert_exact(values, torch.tensor([[3, 3], [0, 0]], dtype=dtype))
    assert not indices.requires_grad
    values.backward(torch.tensor([[5, 6], [7, 8]], dtype=dtype))
    assert_exact(g.grad, torch.tensor([[0, 5, 6, 0], [7, 8, 0, 0]], dtype=dtype))


@pytest.mark.parametrize(("n", "channels", "k"), [(3, 7, 4), (1, 1, 1), (2, 5, 5), (0, 3, 2)])
def test_k_winners_pass_gradcheck(n: int, channels: int, k: int) -> None:
    # far apart: a small step must not change the winners
    g = torch.rand(n, channels).argsort(1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: k_winners(g, k)[1], g)
    assert torch.autograd.gradgradcheck(lambda g: k_winners(g, k)[1], g)


def test_k_winners_ask_for_the_backend_of_g(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, calls = [], []

    class Backend:
        @staticmethod
        def k_winners(g: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(k)
            return gate.k_winners(g, k)

    monkeypatch.setattr(backend, "choose", lambda device: asked.append(device) or Backend)
    g = torch.randn(2, 5)
    k_winners(g, 3)
    assert asked == [g.device] and calls == [3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(3, 2), (0, 2), (2, 5)], ids=str)
def test_k_winners_pass_opcheck(n: int, k: int, dtype: torch.dtype) -> None:
    op = torch.ops.dcx_kernels.k_winners.default
    torch.library.opcheck(op, (torch.randn(n, 5).to(dtype), k))
    torch.library.opcheck(op, (torch.randn(5, n).to(dtype).t(), k))


# torch 2.11 warns of what it does itself: tracing an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_k_winners_compile_into_one_graph() -> None:
    g = torch.randn(3, 6, requires_grad=True)
    again = g.detach().clone().requires_grad_()

    def gated(g: torch.Tensor, k: int) -> torch.Tensor:
        indices, values = k_winners(g, k)
        return (values * (indices + 1)).sum()

    compiled = torch.compile(gated, backend="aot_eager", fullgraph=True)
    for k in (1, 4, 6):
        compiled(g, k).backward()
        gated(again, k).backward()
    assert_exact(g.grad, again.grad)


@pytest.mark.parametrize(
    ("g", "k", "message"),
    [
        (torch.randn(2, 5), 0, r"k in \[1, 5\], got 0"),
        (torch.randn(2, 5), 6, r"k in \[1, 5\], got 6"),
        (torch.empty(2, 0), 1, r"k in \[1, 0\], got 1"),
        (torch.randn(5), 1, r"2-D floating g, got torch.float32 of shape \(5,\)"),
        (torch.ones(2, 5).int(), 1, r"2-D floating g, got torch.int32 of shape \(2, 5\)"),
    ],
    ids=["k-0", "k-above", "no-channels", "1-D", "integers"],
)
def test_k_winners_name_what_is_wrong(g: Any, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        k_winners(g, k)

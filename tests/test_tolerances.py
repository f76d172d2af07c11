"""The comparisons themselves: each must accept what is right and raise on what is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tolerances import (
    assert_close_to_float64,
    assert_exact,
    assert_gradients_close,
    assert_reruns_equal,
)


def _four(value: float) -> torch.Tensor:
    return torch.full((4,), value, dtype=torch.float64)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_exact_accepts_equal_bits() -> None:
    x = torch.tensor([1.0, float("nan"), -0.0])
    assert_exact(x.clone(), x)
    assert_exact(torch.arange(6).reshape(2, 3).t(), torch.arange(6).reshape(2, 3).t().contiguous())
    assert_exact(torch.tensor([True, False]), torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, 2.0 + 2e-7]), r"1 of 2 entries differ, the first at \(1,\)"),
        (torch.tensor([1.0, 2.0]).double(), "expected torch.float32, got torch.float64"),
        (torch.tensor([1.0]), r"expected shape \(2,\), got \(1,\)"),
        (torch.tensor([1.0, float("nan")]), "1 of 2"),
    ],
)
def test_exact_raises(actual: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_exact(actual, torch.tensor([1.0, 2.0]))


def test_exact_tells_signed_zeros_apart() -> None:
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_exact(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_reruns_equal_accepts_a_function() -> None:
    x = torch.randn(8)
    assert_reruns_equal(lambda: x.sin())
    assert_reruns_equal(lambda: (x.sin(), x.cos()))


def test_reruns_equal_raises_on_drift() -> None:
    results = iter([1.0, 1.0, 1.0 + 1e-6])
    with pytest.raises(AssertionError, match="result 0 of rerun 2"):
        assert_reruns_equal(lambda: torch.tensor(next(results)))


def test_reruns_equal_refuses_to_compare_nothing() -> None:
    with pytest.raises(AssertionError, match="got none"):
        assert_reruns_equal(list)
    with pytest.raises(AssertionError, match="at least two"):
        assert_reruns_equal(lambda: torch.ones(1), times=1)


def _conv(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 63, 8, 8, dtype=dtype)
    w = torch.randn(17, 63, 3, 3, dtype=dtype)
    return F.conv2d(x, w, padding=1), F.conv2d(x.double(), w.double(), padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64_accepts_torch_itself(dtype: torch.dtype) -> None:
    ours, truth = _conv(dtype)
    assert_close_to_float64(ours, ours.clone(), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64_raises_on_three_times_the_error(dtype: torch.dtype) -> None:
    ours, truth = _conv(dtype)
    worst = (ours.double() - truth).abs().max()
    floor = ((truth.to(dtype) + 0.3 - 0.3) - truth.to(dtype)).double().abs().max()
    wrong = ours.clone()
    wrong.view(-1)[5] += (3 * worst + 2 * floor).to(dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_float64(wrong, ours, truth)


def test_close_to_float64_is_relative_in_float64() -> None:
    ours, truth = _conv(torch.float64)
    assert_close_to_float64(ours * (1 + 1e-10), ours, truth)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_float64(ours * (1 + 1e-8), ours, truth)


def test_close_to_float64_raises_on_nan_and_infinity() -> None:
    ours, truth = _conv(torch.float32)
    for bad in (float("nan"), float("inf")):
        wrong = ours.clone()
        wrong.view(-1)[0] = bad
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_float64(wrong, ours, truth)
        with pytest.raises(AssertionError, match="finite truth"):
            assert_close_to_float64(ours, ours, wrong.double())


def test_close_to_float64_raises_on_shape_and_dtype() -> None:
    ours, truth = _conv(torch.float32)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_close_to_float64(ours[:1], ours, truth)
    with pytest.raises(AssertionError, match=r"expected torch\.float32, got torch\.bfloat16"):
        assert_close_to_float64(ours.bfloat16(), ours, truth)
    with pytest.raises(AssertionError, match="expected a float64 truth"):
        assert_close_to_float64(ours, ours, ours)


def test_gradients_accept_rounding_and_true_zeros() -> None:
    expected = {"weight": _four(1e3), "bias": _four(0.0)}
    actual = {"weight": expected["weight"] * (1 + 1e-10), "bias": _four(5e-13)}
    assert_gradients_close(actual, expected)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (1e3 * (1 + 1e-8), 0.0, r"1 of 2 differ: weight"),
        (1e3, 1e-11, r"1 of 2 differ: bias"),
        (float("nan"), 0.0, r"1 of 2 differ: weight"),
        (float("inf"), 1.0, r"2 of 2 differ"),
    ],
)
def test_gradients_raise(weight: float, bias: float, message: str) -> None:
    expected = {"weight": _four(1e3), "bias": _four(0.0)}
    actual = {"weight": _four(weight), "bias": _four(bias)}
    with pytest.raises(AssertionError, match=message):
        assert_gradients_close(actual, expected)


def test_gradients_raise_on_infinite_expectation() -> None:
    both = {"weight": torch.tensor([float("inf")])}
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        assert_gradients_close(both, both)


def test_gradients_raise_on_names_shapes_and_nothing() -> None:
    one = {"weight": torch.ones(2)}
    with pytest.raises(AssertionError, match=r"missing \['weight'\], extra \['bias'\]"):
        assert_gradients_close({"bias": torch.ones(2)}, one)
    with pytest.raises(AssertionError, match=r"weight: expected shape \(2,\), got \(1,\)"):
        assert_gradients_close({"weight": torch.ones(1)}, one)
    with pytest.raises(AssertionError, match="got none"):
        assert_gradients_close({}, {})

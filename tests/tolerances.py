"""The one table of tolerances. No environment variable loosens it, and no test types its own.

========================  ==========================================================================
index operations, reruns  bit-equal: `assert_exact`, `assert_reruns_equal`
float operations          max error against float64 <= 2x torch's own in that dtype + a rounding
                          floor: `assert_close_to_float64` (float64 itself: relative 1e-9)
gradients, networks       ||a - b|| <= 1e-9 max(||b||, 1e-6 ||all gradients||):
                          `assert_gradients_close`
========================  ==========================================================================

The rounding floor is what adding and taking away 0.3 does to the result in its own dtype. The 1e-6
is there because some true gradients are 0, such as that of a conv bias before batch norm.

Every function raises AssertionError, and refuses to compare nothing with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "RELATIVE",
    "assert_close_to_float64",
    "assert_exact",
    "assert_gradients_close",
    "assert_reruns_equal",
]

RELATIVE = 1e-9
_SHARE_OF_ALL = 1e-6
_TIMES_TORCH = 2.0
_NUDGE = 0.3
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_exact(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Require the same shape, dtype and bits; NaN equals the same NaN, -0.0 is not 0.0."""
    _same_shape(actual, expected, name)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: expected {expected.dtype}, got {actual.dtype}")
    different = _bits(actual) != _bits(expected)
    if different.any():
        where = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(different.sum())} of {actual.numel()} entries differ, the first at "
            f"{where}: expected {expected[where].item()!r}, got {actual[where].item()!r}"
        )


def assert_reruns_equal(run: Callable[[], Tensor | Sequence[Tensor]], times: int = 3) -> None:
    """Require bit-equal results of ``times`` calls; ``run`` must not return what it overwrites."""
    if times < 2:
        raise AssertionError(f"expected at least two runs to compare, got {times}")
    first = _as_list(run())
    if not first:
        raise AssertionError("expected results to compare, got none")
    for rerun in range(1, times):
        again = _as_list(run())
        if len(again) != len(first):
            raise AssertionError(f"expected {len(first)} results, got {len(again)}")
        for index, (a, b) in enumerate(zip(again, first, strict=True)):
            assert_exact(a, b, f"result {index} of rerun {rerun}")


def assert_close_to_float64(
    actual: Tensor, torch_same_dtype: Tensor, float64_truth: Tensor, name: str = "tensor"
) -> None:
    """Require an error of at most twice torch's own in the same dtype, plus a rounding floor.

    Args:
        actual: our result.
        torch_same_dtype: torch's result for the same inputs in the same dtype.
        float64_truth: torch's result for the same inputs, converted to float64 before computing.
        name: what the message calls it.
    """
    _same_shape(actual, float64_truth, name)
    _same_shape(torch_same_dtype, float64_truth, f"{name}: torch's result")
    if float64_truth.dtype != torch.float64:
        raise AssertionError(f"{name}: expected a float64 truth, got {float64_truth.dtype}")
    if actual.dtype != torch_same_dtype.dtype:
        raise AssertionError(f"{name}: expected {torch_same_dtype.dtype}, got {actual.dtype}")
    if not float64_truth.isfinite().all():
        raise AssertionError(f"{name}: expected a finite truth")
    if actual.numel() == 0:
        return
    if actual.dtype == torch.float64:
        assert_gradients_close({name: actual}, {name: float64_truth})
        return
    error = _max(actual.double() - float64_truth)
    own = _max(torch_same_dtype.double() - float64_truth)
    rounded = float64_truth.to(actual.dtype)
    floor = _max((rounded + _NUDGE - _NUDGE).double() - rounded.double())
    bound = _TIMES_TORCH * own + floor
    if not error <= bound:  # a NaN is not within anything
        raise AssertionError(
            f"{name}: error {error:.3e} in {actual.dtype} exceeds {bound:.3e} "
            f"(2 x torch's {own:.3e} + rounding {floor:.3e})"
        )


def assert_gradients_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tol: float = RELATIVE
) -> None:
    """Require ``||a - b|| <= tol * max(||b||, 1e-6 * norm of all expected)`` for every name."""
    if not expected:
        raise AssertionError("expected gradients to compare, got none")
    if actual.keys() != expected.keys():
        missing, extra = expected.keys() - actual.keys(), actual.keys() - expected.keys()
        raise AssertionError(f"names differ: missing {sorted(missing)}, extra {sorted(extra)}")
    norms = {name: _norm(value) for name, value in expected.items()}
    share = _SHARE_OF_ALL * sum(norm**2 for norm in norms.values()) ** 0.5
    wrong = []
    for name, value in expected.items():
        _same_shape(actual[name], value, name)
        error = _norm(actual[name].double() - value.double())
        bound = tol * max(norms[name], share)
        if not error <= bound:
            wrong.append(f"{name}: ||a - b|| = {error:.3e} exceeds {bound:.3e}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(expected)} differ: " + "; ".join(wrong))


def _same_shape(actual: Tensor, expected: Tensor, name: str) -> None:
    if actual.shape != expected.shape:
        wanted, got = tuple(expected.shape), tuple(actual.shape)
        raise AssertionError(f"{name}: expected shape {wanted}, got {got}")


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.view(_BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _as_list(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def _max(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())

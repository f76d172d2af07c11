"""What native batch norm leaves to the reference, and what its operators refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native import load
from tolerances import assert_exact, assert_gradients_close

if (lacking := load("cpu")) is not None:
    pytest.skip(f"the native library of CPUs is {lacking}", allow_module_level=True)

from dcx_kernels.kernels.native.cpu import batch_norm

_OPS = torch.ops.dcx_native
_FWD = ("x", "weight", "bias", "running_mean", "running_var", "active")
_BWD = ("dy", "x", "y", "weight", "bias", "mean", "invstd")
Change = dict[str, Callable[[Tensor], Tensor | None]]


def _given(dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    x, dy = torch.randn(2, 3, 4, 5, 6, dtype=dtype).unbind()
    vectors = torch.randn(2, 4, dtype=dtype)
    running = torch.rand(2, 4).to(torch.promote_types(dtype, torch.float32))
    given: dict[str, Tensor | None] = {"x": x, "dy": dy, "active": torch.tensor([0, 1, 2, 3])}
    given.update(zip(("weight", "bias"), vectors, strict=True))
    given.update(zip(("running_mean", "running_var"), running.clone(), strict=True))
    alone = given | dict.fromkeys(("running_mean", "running_var", "active"))
    given.update(zip(("y", "mean", "invstd"), _forward(reference, alone), strict=True))
    return given


def _forward(backend: Any, given: dict[str, Tensor | None]) -> list[Tensor]:
    """Return y, mean and invstd, and the running statistics thereafter."""
    args = [given[name] for name in _FWD]
    for i in (3, 4):
        if (vector := args[i]) is not None:  # a clone would lie elsewhere, and contiguous
            args[i] = torch.empty_strided(vector.shape, vector.stride(), dtype=vector.dtype)
            args[i].copy_(vector)  # type: ignore[union-attr]
    results = backend.channel_batch_norm_fwd(*args, True, 0.3, 1e-3, True)
    return [*results, *(v for v in args[3:5] if v is not None)]


def _backward(backend: Any, given: dict[str, Tensor | None]) -> list[Tensor]:
    args = [given[name] for name in _BWD]
    return list(backend.channel_batch_norm_bwd(*args, True, 1e-3, False))


def _apart(vector: Tensor) -> Tensor:
    return vector.repeat_interleave(2)[::2]


def _half(vector: Tensor) -> Tensor:
    return vector.bfloat16()


def _outcome(run: Callable[..., list[Tensor]], *args: Any) -> list[Tensor] | str:
    try:
        return run(*args)
    except (RuntimeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float32, {"weight": _apart}),
        (torch.float32, {"bias": _apart}),
        (torch.float32, {"weight": Tensor.double, "bias": Tensor.double}),
        (torch.float32, {"weight": _half, "bias": _half}),
        (torch.float32, {"running_mean": _apart}),
        (torch.float32, {"running_var": _apart}),
        (torch.float32, {"running_mean": Tensor.double, "running_var": Tensor.double}),
        (torch.bfloat16, {"running_mean": _half, "running_var": _half}),
        (torch.float32, {"running_var": lambda _: None, "active": lambda _: None}),
        (torch.float32, {"running_mean": lambda _: None, "active": lambda _: None}),
    ],
)
def test_forward_of_other_vectors_is_the_references(dtype: torch.dtype, change: Change) -> None:
    """Results to the last bit, or the same error."""
    given = _given(dtype)
    given.update({name: how(given[name]) for name, how in change.items()})  # type: ignore[arg-type]
    found, wanted = (_outcome(_forward, kind, given) for kind in (batch_norm, reference))
    _same(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float32, {"weight": _apart}),
        (torch.float32, {"bias": _apart}),
        (torch.float32, {"weight": Tensor.double}),
        (torch.float32, {"dy": _half}),
        (torch.float32, {"dy": Tensor.double}),
        (torch.float32, {"mean": Tensor.double, "invstd": Tensor.double}),
        (torch.bfloat16, {"mean": _half, "invstd": _half}),
    ],
)
def test_backward_of_other_vectors_is_the_references(dtype: torch.dtype, change: Change) -> None:
    given = _given(dtype)
    given.update({name: how(given[name]) for name, how in change.items()})  # type: ignore[arg-type]
    found, wanted = (_outcome(_backward, kind, given) for kind in (batch_norm, reference))
    _same(found, wanted)


def _same(found: list[Tensor] | str, wanted: list[Tensor] | str) -> None:
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted
        return
    for one, other in zip(found, wanted, strict=True):
        assert_exact(one, other)


def _operator(name: str, given: dict[str, Tensor | None], training: bool) -> list[Tensor]:
    if name == "fwd":
        args = [given[key] for key in _FWD]
        return list(_OPS.batch_norm_fwd(*args, training, 0.3, 1e-3, True))
    return list(_OPS.batch_norm_bwd(*(given[key] for key in _BWD), training, False))


@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_operators_in_evaluation(name: str) -> None:
    """The backend does not ask for it, but the operators stand for it."""
    given = _given(torch.float64)
    given["active"] = torch.tensor([1, 2, 4, 7])
    for key in ("running_mean", "running_var"):
        given[key] = torch.rand(8, dtype=torch.float64)
    args = [given[key] for key in (_FWD if name == "fwd" else _BWD)]
    if name == "fwd":
        wanted = reference.channel_batch_norm_fwd(*args, False, 0.3, 1e-3, True)  # type: ignore[arg-type]
    else:
        wanted = reference.channel_batch_norm_bwd(*args, False, 1e-3, False)  # type: ignore[arg-type]
    found = _operator(name, given, training=False)
    assert_gradients_close(
        {str(i): value for i, value in enumerate(found)},
        {str(i): value for i, value in enumerate(wanted)},
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fwd", {"active": torch.tensor([0, 1, 2, 4])}, "active channels that exist, got 4"),
        ("fwd", {"active": torch.tensor([0, -1, 2, 3])}, "active channels that exist, got -1"),
        ("fwd", {"active": torch.tensor([0, 1, 2])}, "an index for every channel"),
        ("fwd", {"active": torch.tensor([0, 1, 2, 3]).int()}, "active int64"),
        ("fwd", {"active": None, "running_var": torch.ones(3)}, "expected 4, got 3"),
        ("fwd", {"running_mean": torch.zeros(4).double()}, "contiguous running statistics"),
        ("fwd", {"running_var": torch.ones(8)[::2]}, "contiguous running statistics"),
        ("fwd", {"running_var": None}, "both statistics or none"),
        ("fwd", {"weight": torch.ones(5)}, "expected 4, got 5"),
        ("fwd", {"weight": torch.ones(8)[::2]}, "a contiguous vector"),
        ("fwd", {"bias": torch.ones(4).half()}, "float32, float64 or bfloat16"),
        ("fwd", {"x": torch.zeros(3, 4, 5, 6).half()}, "x of float32, float64 or bfloat16"),
        ("fwd", {"x": torch.zeros(0, 4, 5, 6)}, "that is not empty"),
        ("bwd", {"dy": torch.zeros(3, 4, 5, 7)}, "dy like x"),
        ("bwd", {"dy": torch.zeros(3, 4, 5, 6).double()}, "dy like x"),
        ("bwd", {"dy": torch.zeros(3, 4, 30)}, "dy like x"),
        ("bwd", {"y": torch.zeros(2, 4, 5, 6)}, "y like x"),
        ("bwd", {"mean": torch.zeros(3)}, "expected 4, got 3"),
        ("bwd", {"invstd": torch.zeros(5)}, "expected 4, got 5"),
    ],
)
def test_operators_refuse(name: str, change: dict[str, Tensor | None], message: str) -> None:
    """The operators themselves, which trust nobody; nothing is written."""
    given = _given() | change
    before = {key: value.clone() for key, value in given.items() if value is not None}
    with pytest.raises(RuntimeError, match=f"batch_norm_{name}: .*{message}"):
        _operator(name, given, training=True)
    for key, value in before.items():
        kept = given[key]
        assert kept is not None
        assert_exact(kept, value, key)


def test_operator_needs_statistics_in_evaluation() -> None:
    given = _given() | {"running_mean": None, "running_var": None}
    with pytest.raises(RuntimeError, match="expected running statistics in evaluation, got none"):
        _operator("fwd", given, training=False)

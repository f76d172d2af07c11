"""Everything between statistics and the vectors of a norm, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton import fold
from tolerances import assert_close_to_float64, assert_exact

COUNT, EPS, MOMENTUM = 12, 1e-3, 0.3


def draw(device: torch.device, channels: int = 5, full: int = 9) -> dict[str, Tensor]:
    """Draw the operands of a norm that has ``channels`` of ``full`` channels."""
    torch.manual_seed(channels)
    drawn = {
        "mean": torch.randn(channels),
        "m2": torch.rand(channels) * COUNT,
        "weight": torch.randn(channels),
        "bias": torch.randn(channels),
        "running_mean": torch.randn(full),
        "running_var": torch.rand(full) + 0.5,
        "active": torch.randperm(full)[:channels].sort().values,
    }
    return {name: tensor.to(device) for name, tensor in drawn.items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("missing", ["", "weight bias", "active"], ids=["all", "plain", "full"])
def test_fold(training: bool, missing: str, device: torch.device) -> None:
    operands = draw(device, *((9,) if missing == "active" else (5,)))
    untouched = operands["running_var"].clone()
    if not training:
        operands["mean"] = operands["m2"] = torch.empty(0, device=device)

    def run(kernels: object, dtype: torch.dtype) -> list[Tensor]:
        args = {
            name: None if name in missing.split() else tensor.clone()
            for name, tensor in operands.items()
        }
        for name, tensor in args.items():
            if tensor is not None and name != "active":
                args[name] = tensor.to(dtype)
        vectors = kernels.norm_fold(  # type: ignore[attr-defined]
            *args.values(), COUNT, training, MOMENTUM, EPS
        )
        return [*vectors, args["running_mean"], args["running_var"]]

    ours, torchs, truth = (
        run(fold, torch.float32), run(reference, torch.float32), run(reference, torch.float64)
    )  # fmt: skip
    names = ("scale", "center", "shift", "invstd", "running mean", "running var")
    for name, one, same, exact in zip(names, ours, torchs, truth, strict=True):
        assert_close_to_float64(one, same, exact, name)
    if training and missing != "active":
        rest = torch.ones(9, dtype=torch.bool, device=device)
        rest[operands["active"]] = False
        assert_exact(ours[-1][rest], untouched[rest])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sets", [None, 3], ids=["batch", "sample"])
def test_gradients_of_a_fold(training: bool, sets: int | None, device: torch.device) -> None:
    shape = (7,) if sets is None else (sets, 7)
    sums = [torch.randn(shape, device=device) for _ in range(2)]
    vectors = [torch.randn(7, device=device) for _ in range(3)]

    def run(kernels: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        operands = [tensor.to(dtype) for tensor in (*sums, *vectors)]
        grads: tuple[Tensor, ...] = kernels.norm_fold_bwd(  # type: ignore[attr-defined]
            *operands, COUNT, training
        )
        return grads

    ours, torchs, truth = (
        run(fold, torch.float32), run(reference, torch.float32), run(reference, torch.float64)
    )  # fmt: skip
    for name, one, same, exact in zip(
        ("dweight", "dbias", "slope", "offset", "saliency"), ours, torchs, truth, strict=True
    ):
        assert_close_to_float64(one, same, exact, name)


def test_no_channel(device: torch.device) -> None:
    nothing = torch.empty(0, device=device)
    vectors = fold.norm_fold(
        nothing, nothing, None, None, None, None, None, COUNT, True, MOMENTUM, EPS
    )
    assert all(vector.shape == (0,) for vector in vectors)
    grads = fold.norm_fold_bwd(*[nothing] * 5, COUNT, True)
    assert all(grad.shape == (0,) for grad in grads)

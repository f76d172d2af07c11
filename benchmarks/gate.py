"""The correctness gate: what is wrong is not timed.

Sparse against masked execution, which shares no operator with it, for the very configuration that
is about to be measured: some optimizer steps with changing sets. And the thin arm against sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

import dcx_kernels as dcx
from benchmarks.arms import HYPER
from benchmarks.problem import Problem

__all__ = ["GateError", "check_close", "check_float32", "check_training"]

FLOAT64 = 1e-9
FLOAT32 = 1e-6
FLOAT32_UPDATE = 0.1
_SHARE_OF_ALL = 1e-6  # some true updates are zero

Sets = Mapping[str, dcx.ChannelSet]


class GateError(AssertionError):
    """A result that was to be timed is wrong."""


def check_training(problem: Problem, sets: Sequence[Sets]) -> None:
    """Train sparse and masked, one step for each of ``sets``, and compare everything.

    On the problem's device. Where it is trained under autocast, read that instead of float32 below;
    updates may then be wrong by 10 % more than twice those of masked execution.

    float64: logits, saliency, updates of all parameters and buffers, tensor by tensor, relative
    1e-9. float32, first step only: logits and running statistics, error against float64 at most
    twice that of masked execution plus relative 1e-6. Updates in float32 are held to 10 % only:
    they jump whenever rounding carries the input of a ReLU across zero (0.4 % for one of them near
    the end of VGG-19), and one step later everything differs. Masked execution does the same.

    Raises:
        GateError: if they differ.
    """
    truth, _ = _train(problem, "mask", torch.float64, sets)
    sparse, model = _train(problem, "sparse", torch.float64, sets)
    check_close(sparse, truth, "sparse and mask, float64")
    masked32, _ = _train(problem, "mask", torch.float32, sets[:1])
    sparse32, _ = _train(problem, "sparse", torch.float32, sets[:1])
    for kind in ("logits.0", "statistics.0"):
        vectors = (_vector(result, kind) for result in (sparse32, masked32, truth))
        check_float32(*vectors, f"sparse, {problem.dtype}: {kind}")
    update, exact = _vector(sparse32, "update.0"), _vector(truth, "update.0")
    bound = FLOAT32_UPDATE * _norm(exact)
    if problem.dtype != "float32":
        bound += 2 * _norm(_vector(masked32, "update.0") - exact)
    if not _norm(update - exact) <= bound:
        raise GateError(f"sparse, {problem.dtype}: update differs by {_norm(update - exact):.3e}")
    images, _labels = problem.data(torch.float64)
    with torch.no_grad():
        thin = dcx.compact(model)(images)
        check_close({"logits": thin}, {"logits": model(images)}, "thin and sparse, float64")


def check_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Require ``||a - b|| <= 1e-9 max(||b||, 1e-6 ||all b||)`` for every tensor.

    Raises:
        GateError: if one differs, or if names or shapes do.
    """
    if actual.keys() != expected.keys():
        raise GateError(f"{what}: expected {sorted(expected)}, got {sorted(actual)}")
    share = _SHARE_OF_ALL * sum(_norm(b) ** 2 for b in expected.values()) ** 0.5
    for name, b in expected.items():
        if actual[name].shape != b.shape:
            raise GateError(f"{what}: {name}: {tuple(b.shape)} != {tuple(actual[name].shape)}")
        error, bound = _norm(actual[name] - b), FLOAT64 * max(_norm(b), share)
        if not error <= bound:
            raise GateError(f"{what}: {name} differs by {error:.3e}, allowed are {bound:.3e}")


def check_float32(
    actual: Tensor, torch_float32: Tensor, truth: Tensor, what: str, floor: float = FLOAT32
) -> float:
    """Require at most twice torch's own float32 error, plus 1e-6 of the norm of the truth.

    Args:
        actual, torch_float32, truth: ours, torch's in the same dtype, and the exact result.
        what: what messages call it.
        floor: what is allowed instead of 1e-6, in a dtype with fewer bits.

    Returns:
        The error relative to the norm of the truth.

    Raises:
        GateError: if it is larger.
    """
    error, own = _norm(actual.double() - truth), _norm(torch_float32.double() - truth)
    bound = 2 * own + floor * _norm(truth)
    if not error <= bound:
        raise GateError(f"{what}: error {error:.3e} exceeds {bound:.3e} (torch's own: {own:.3e})")
    return error / max(_norm(truth), torch.finfo(torch.float64).tiny)


def _train(
    problem: Problem, execution: str, dtype: torch.dtype, sets: Sequence[Sets]
) -> tuple[dict[str, Tensor], dcx.ChannelModel]:
    """Run the steps; return logits, saliencies and updates by name, in float64, and the model."""
    model = problem.converted(execution, "batch", dtype)
    optimizer = dcx.optim.SGD(model, **HYPER)
    parameters = {name for name, _ in model.named_parameters()}
    before = _state(model)
    images, labels = problem.data(dtype)
    autocast = problem.autocast() if dtype == torch.float32 else nullcontext()
    result = {}
    for number, chosen in enumerate(sets):
        model.set_active(chosen)
        optimizer.zero_grad()
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        result[f"logits.{number}.all"] = logits.detach().double()
        for name, value in model.saliency().items():
            result[f"saliency.{number}.{name}"] = value.double()
        optimizer.step()
        after = _state(model)
        for name, tensor in after.items():
            kind = "update" if name in parameters else "statistics"
            if name.endswith("num_batches_tracked"):  # would hide errors of the statistics
                kind = "count"
            result[f"{kind}.{number}.{name}"] = tensor - before[name]
        before = after
    return result, model


def _state(model: dcx.ChannelModel) -> dict[str, Tensor]:
    return {n: tensor.to(torch.float64, copy=True) for n, tensor in model.state_dict().items()}


def _vector(result: Mapping[str, Tensor], kind: str) -> Tensor:
    return torch.cat([t.flatten() for name, t in result.items() if name.startswith(f"{kind}.")])


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double()))

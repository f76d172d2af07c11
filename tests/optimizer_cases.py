"""Cases and oracles of optimizer steps on slices: what every backend that reads tables shows.

A backend's test gives its functions, the device, and ``calls``: a list that fills with the dtype of
each launch, and with the number of parameters of each call of the reference.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dcx_kernels as dcx
from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from networks import Chain, random_sets
from slice_cases import CASES, make, masks, nothing
from tolerances import assert_close_to_float64, assert_exact

__all__ = [
    "ADAMW",
    "ADAMW_DEFAULTS",
    "SGD",
    "SGD_DEFAULTS",
    "check_buffers_without_momentum",
    "check_channels_last",
    "check_mismatch",
    "check_mixed_dtypes",
    "check_network",
    "check_no_decay",
    "check_no_parameters",
    "check_rest",
    "check_step",
    "check_step_counts_elsewhere",
    "check_tensor_learning_rate",
    "note_reference",
]

CPU = torch.device("cpu")

SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True, "maximize": True},
    "dampening": {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01, "maximize": True},
}
ADAMW: dict[str, dict[str, Any]] = {
    "adamw": {},
    "no decay": {"weight_decay": 0.0, "maximize": True},
    "amsgrad": {"amsgrad": True, "eps": 1e-3},
}
SGD_DEFAULTS = {
    "lr": 0.3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False,
}  # fmt: skip
ADAMW_DEFAULTS = {
    "lr": 0.3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False,
}  # fmt: skip


class _Problem:
    """Parameters and states with NaN where nothing is active, and packed gradients."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.slices = make(device)
        self.masks = [mask.to(device) for mask in masks(self.slices)]
        self.params = self._full(torch.randn, dtype, device)
        # squares among them
        self.states = [self._full(torch.rand, dtype, device) for _ in range(3)]
        self.steps = [torch.tensor(float(index % 5)) for index in range(len(CASES))]
        self.fresh = [index % 3 == 0 for index in range(len(CASES))]
        self.grads = [
            torch.randn_like(p) for p in reference.gather_slices(self.params, self.slices)
        ]

    def _full(self, draw: Any, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        full = []
        for case, mask in zip(CASES.values(), self.masks, strict=True):
            full.append(torch.where(mask, draw(case.shape, device=device), torch.nan).to(dtype))
        return full

    def updated(self, by: Any, dtype: torch.dtype, settings: dict[str, Any]) -> list[list[Tensor]]:
        """Return parameters and states, each as a list, after one step in ``dtype``."""
        params, grads, *states = (
            [tensor.to(dtype, copy=True) for tensor in tensors]
            for tensors in (self.params, self.grads, *self.states)
        )
        steps = [step.clone() for step in self.steps]
        if "betas" in settings:
            settings = dict(settings)
            states = states if settings.pop("amsgrad", False) else [*states[:2], None]
            by.adamw_slices_(params, grads, *states, steps, self.slices, **settings)
            assert [int(step) for step in steps] == [int(step) + 1 for step in self.steps]
        else:
            states = states[:1] if settings["momentum"] else [None]
            by.sgd_slices_(params, grads, *states, self.slices, self.fresh, **settings)
        return [params, *(state for state in states if state is not None)]


def check_step(
    kernels: Any, dtype: torch.dtype, settings: dict[str, Any], device: torch.device = CPU
) -> None:
    """Active entries as torch has them, within the tolerances; the rest bitwise as it was."""
    problem = _Problem(device, dtype)
    before = [problem.params, *problem.states]
    ours = problem.updated(kernels, dtype, settings)
    torchs = problem.updated(reference, dtype, settings)
    truth = problem.updated(reference, torch.float64, settings)
    for which, tensors in enumerate(zip(ours, torchs, truth, before, strict=False)):
        assert_close_to_float64(
            *(_active(problem, part) for part in tensors[:3]), f"tensor {which}"
        )
        for name, mask, got, old in zip(CASES, problem.masks, tensors[0], tensors[3], strict=True):
            assert_exact(got[~mask], old[~mask], f"{name} {which}")
            assert which or not torch.equal(got[mask], old[mask]), name


def _active(problem: _Problem, tensors: list[Tensor]) -> Tensor:
    """Return all active entries: of one number alone, torch's error may be 0."""
    return torch.cat([t[mask] for t, mask in zip(tensors, problem.masks, strict=True)])


def note_reference(monkeypatch: pytest.MonkeyPatch, calls: list[object]) -> None:
    """Append to ``calls`` how many parameters the reference gets."""

    def noted(function: Any) -> Any:
        def call(*args: Any, **settings: Any) -> None:
            calls.append(len(args[0]))
            function(*args, **settings)

        return call

    for name in ("sgd_slices_", "adamw_slices_"):
        monkeypatch.setattr(reference, name, noted(getattr(reference, name)))


def check_mixed_dtypes(
    kernels: Any, calls: list[object], expected: list[object], device: torch.device = CPU
) -> None:
    """float32, bfloat16 and float64 in one call: each is updated, and each write is noted."""
    problem = _Problem(device, torch.float64)
    settings = {**SGD_DEFAULTS, **SGD["momentum"]}
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    mixed = [
        [tensor.to(dtypes[index % 3], copy=True) for index, tensor in enumerate(tensors)]
        for tensors in (problem.params, problem.grads, problem.states[0])
    ]
    twins = [[tensor.clone() for tensor in tensors] for tensors in mixed]
    exact = [[tensor.double() for tensor in tensors] for tensors in mixed]
    versions = [[tensor._version for tensor in tensors] for tensors in mixed]
    kernels.sgd_slices_(*mixed, problem.slices, problem.fresh, **settings)
    assert calls == expected
    reference.sgd_slices_(*twins, problem.slices, problem.fresh, **settings)
    reference.sgd_slices_(*exact, problem.slices, problem.fresh, **settings)
    for start, dtype in enumerate(dtypes):
        masks_ = problem.masks[start::3]
        flat = [
            torch.cat([t[m] for t, m in zip(run[0][start::3], masks_, strict=True)])
            for run in (mixed, twins, exact)
        ]
        assert_close_to_float64(*flat, str(dtype))
    for index, name in enumerate(CASES):
        # whoever keeps a copy must see that it is old; the reference leaves that to torch
        if dtypes[index % 3] in expected:
            assert mixed[0][index]._version > versions[0][index], name
            assert mixed[2][index]._version > versions[2][index], name
        assert mixed[1][index]._version == versions[1][index], name


def check_channels_last(kernels: Any, calls: list[object], device: torch.device = CPU) -> None:
    """They lie flat, in another order; strided ones do not."""
    for expected, layout in (torch.float32, torch.channels_last), (1, None):
        base = torch.randn(4, 3, 5, 2, device=device)
        values = [base + number for number in range(3)]
        if layout is not None:
            values = [value.contiguous(memory_format=layout) for value in values]
        else:
            values = [torch.stack([value, value], -1)[..., 0] for value in values]
        param, grad, buffer = values
        same = [tensor.clone() for tensor in values]
        exact = [tensor.double() for tensor in values]
        calls.clear()
        settings = {**SGD_DEFAULTS, **SGD["momentum"]}
        kernels.sgd_slices_([param], [grad], [buffer], [None], [False], **settings)
        assert calls == [expected]
        for twin, slope, moment in (same, exact):
            reference.sgd_slices_([twin], [slope], [moment], [None], [False], **settings)
        for got, wanted, truth in zip(values, same, exact, strict=True):
            assert_close_to_float64(got, wanted, truth)


def check_tensor_learning_rate(
    kernels: Any, name: str, calls: list[object], device: torch.device = CPU
) -> None:
    """One on the host is a number; one elsewhere would have to be waited for."""
    problem = _Problem(device, torch.float32)
    settings = dict(ADAMW_DEFAULTS if name == "adamw" else SGD_DEFAULTS)
    rate = torch.tensor(0.3)
    ours = problem.updated(kernels, torch.float32, {**settings, "lr": rate})
    same = problem.updated(kernels, torch.float32, {**settings, "lr": float(rate)})
    assert calls == [torch.float32] * 2
    torchs = problem.updated(reference, torch.float32, {**settings, "lr": float(rate)})
    truth = problem.updated(reference, torch.float64, {**settings, "lr": float(rate)})
    for mine, other, own, exact in zip(ours, same, torchs, truth, strict=True):
        for got, wanted in zip(mine, other, strict=True):
            assert_exact(got, wanted)
        assert_close_to_float64(*(_active(problem, part) for part in (mine, own, exact)))


def check_step_counts_elsewhere(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, calls: list[object], device: torch.device = CPU
) -> None:
    """A step count, or a learning rate, that is not on the host: everything goes another way."""
    for name in ("adamw_slices_", "sgd_slices_"):
        monkeypatch.setattr(reference, name, lambda *args, **settings: calls.append(len(args[0])))
    full = [[torch.ones(3, device=device)] * 2 for _ in range(4)]
    away, here = torch.ones((), device="meta"), torch.ones(())
    kernels.adamw_slices_(*full, None, [here, away], [None, None], **ADAMW_DEFAULTS)
    rated: dict[str, Any] = {**ADAMW_DEFAULTS, "lr": away}
    kernels.adamw_slices_(*full, None, [here, here], [None, None], **rated)
    rated = {**SGD_DEFAULTS, "lr": away}
    kernels.sgd_slices_(*full[:2], None, [None, None], [False] * 2, **rated)
    assert calls == [2, 2, 2]
    assert all(tensor.eq(1).all() for tensors in full for tensor in tensors) and here == 1


def check_no_parameters(kernels: Any, name: str, device: torch.device = CPU) -> None:
    """No parameter, and slices without an entry."""
    slices: list[Slice | None] = [*nothing(device)]
    dense = [torch.full(slice_.shape, torch.nan, device=device) for slice_ in nothing(device)]
    packed = [torch.empty(slice_.packed_shape, device=device) for slice_ in nothing(device)]
    for count in (0, 3):
        lists = (dense[:count], packed[:count], dense[:count])
        if name == "sgd":
            kernels.sgd_slices_(*lists, slices[:count], [False] * count, **SGD_DEFAULTS)
        else:
            steps = [torch.tensor(0.0) for _ in range(count)]
            states = lists[2], [tensor.clone() for tensor in lists[2]]
            kernels.adamw_slices_(
                *lists[:2], *states, None, steps, slices[:count], **ADAMW_DEFAULTS
            )


def check_no_decay(kernels: Any, device: torch.device = CPU) -> None:
    """Without decay an infinite weight stays one: 0 * inf would be NaN."""
    param, grad = torch.full((5,), torch.inf, device=device), torch.ones(5, device=device)
    settings = {**SGD_DEFAULTS, "weight_decay": 0.0}
    kernels.sgd_slices_([param], [grad], None, [None], [False], **settings)
    assert param.isinf().all()
    moments = [[torch.zeros(5, device=device)] for _ in range(2)]
    settings = {**ADAMW_DEFAULTS, "weight_decay": 0.0}
    kernels.adamw_slices_([param], [grad], *moments, None, [torch.tensor(0.0)], [None], **settings)
    assert param.isinf().all()


def check_rest(kernels: Any, calls: list[object], device: torch.device = CPU) -> None:
    """Strided tensors among flat ones: each gets its own gradient, state, step count and flag."""
    number = 6

    def full(dtype: torch.dtype) -> list[list[Tensor]]:
        torch.manual_seed(1)
        made = [[torch.rand(5, 4).to(device, dtype) for _ in range(number)] for _ in range(5)]
        # every other one lies across
        return [[t if n % 2 else t.t().contiguous().t() for n, t in enumerate(ts)] for ts in made]

    def run(by: Any, dtype: torch.dtype) -> list[list[Tensor]]:
        params, grads, *states = full(dtype)
        steps = [torch.tensor(float(n)) for n in range(number)]
        by.adamw_slices_(params, grads, *states, steps, [None] * number, **ADAMW_DEFAULTS)
        more, slopes, buffers, *_ = full(dtype)
        fresh = [n in (0, 3) for n in range(number)]
        settings = {**SGD_DEFAULTS, **SGD["dampening"]}
        by.sgd_slices_(more, slopes, buffers, [None] * number, fresh, **settings)
        return [params, *states, more, buffers]

    ours = run(kernels, torch.float32)
    assert calls == [3, torch.float32] * 2
    for tensors in zip(
        *ours, *run(reference, torch.float32), *run(reference, torch.float64), strict=True
    ):
        count = len(ours)
        for got, own, exact in zip(
            tensors[:count], tensors[count : 2 * count], tensors[2 * count :], strict=True
        ):
            assert_close_to_float64(got, own, exact)


def check_buffers_without_momentum(kernels: Any, device: torch.device = CPU) -> None:
    """torch leaves them alone."""
    param, grad, buffer = (torch.full((5,), 7.0, device=device) for _ in range(3))
    version = buffer._version
    kernels.sgd_slices_([param], [grad], [buffer], [None], [False], **SGD_DEFAULTS)
    assert param.lt(7).all() and buffer.eq(7).all() and buffer._version == version


def check_mismatch(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, calls: list[object], device: torch.device = CPU
) -> None:
    """What does not match is not written by address."""
    monkeypatch.setattr(reference, "sgd_slices_", lambda *args, **_: calls.append(len(args[0])))

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    listed = torch.tensor([1, 4], device=device)
    slice_, narrow = Slice((6, 4), listed), Slice((6, 4), listed.int())
    wrong = {
        "parameter": (ones(5, 4), ones(2, 4), ones(5, 4), slice_),
        "gradient": (ones(6, 4), ones(3, 4), ones(6, 4), slice_),
        "dtype": (ones(6, 4), ones(2, 4).double(), ones(6, 4), slice_),
        "buffer": (ones(6, 4), ones(2, 4), ones(7, 4), slice_),
        "list": (ones(6, 4), ones(2, 4), ones(6, 4), narrow),
    }
    for name, (param, grad, buffer, used) in wrong.items():
        calls.clear()
        settings = {**SGD_DEFAULTS, **SGD["momentum"]}
        kernels.sgd_slices_([param], [grad], [buffer], [used], [False], **settings)
        assert calls == [1] and param.eq(1).all() and buffer.eq(1).all(), name


def check_network(
    backend: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device = CPU
) -> None:
    """Three steps, new sets each: packed, updated, and what is inactive bitwise untouched."""
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 1e-3}
    settings |= {"momentum": 0.9} if name == "SGD" else {"eps": 1e-4}
    dense, x = Chain(), torch.randn(2, 3, 9, 9)
    sets = [random_sets(dcx.convert(dense, x)) for _ in range(3)]

    def train(chosen: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[int, Any]]:
        """Only slices go by ``chosen``; layers go by the reference."""
        for place in ("ops.slot", "optim._active"):
            way = SimpleNamespace(choose=lambda device: chosen)
            monkeypatch.setattr(f"dcx_kernels.{place}.backend", way)
        network = Chain().to(device, dtype)
        network.load_state_dict(dense.state_dict())
        model = dcx.convert(network, x.to(device, dtype))
        optimizer = getattr(dcx.optim, name)(model, **settings)
        for chosen_sets in sets:
            model.set_active(chosen_sets)
            optimizer.zero_grad()
            model(x.to(device, dtype)).square().mean().backward()
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()["state"]

    ours, torchs = train(backend, torch.float32), train(reference, torch.float32)
    truth = train(reference, torch.float64)
    for which, start in (0, dense.state_dict()), (1, None):
        runs = [_floats(run[which]) for run in (ours, torchs, truth)]
        flat = [torch.cat([value.flatten() for value in run.values()]) for run in runs]
        assert_close_to_float64(flat[0], flat[1], flat[2].double(), "weights" if start else "state")
        for key, got in runs[0].items():
            old = torch.zeros_like(got) if start is None else start[key].to(device)
            touched = (runs[1][key] != old) | (runs[2][key] != old)
            assert_exact(got[~touched], old[~touched], key)


def _floats(state: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the floating-point tensors of a state_dict, by names of their own."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= {f"{key} {name}": tensor for name, tensor in _floats(value).items()}
        elif value.is_floating_point() and value.dim():
            found[str(key)] = value
    return found

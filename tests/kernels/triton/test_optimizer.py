"""Optimizer steps on slices in one launch: torch's fused ones within the tolerances."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dcx_kernels as dcx
from dcx_kernels.kernels import triton
from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from dcx_kernels.kernels.triton import optimizer as kernels
from networks import Chain, random_sets
from slice_cases import CASES, make, masks, nothing
from tolerances import assert_close_to_float64, assert_exact

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


def _check(device: torch.device, dtype: torch.dtype, settings: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", SGD)
def test_sgd_steps(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    _check(device, dtype, {**SGD_DEFAULTS, **SGD[variant]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ADAMW)
def test_adamw_steps(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    _check(device, dtype, {**ADAMW_DEFAULTS, **ADAMW[variant]})


class _Launches:
    """Stand for a kernel and count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.kernel, self.count = getattr(kernels, name), 0
        monkeypatch.setattr(kernels, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.count += 1
        return self.kernel[grid]


def test_one_launch_a_dtype(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does not know is updated as well, with the others in one call."""
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
    launches = _Launches(monkeypatch, "_sgd_slices_kernel")
    kernels.sgd_slices_(*mixed, problem.slices, problem.fresh, **settings)
    assert launches.count == 2
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
        if index % 3 < 2:  # whoever keeps a copy must see that it is old
            assert mixed[0][index]._version > versions[0][index], name
            assert mixed[2][index]._version > versions[2][index], name


def test_weights_of_channels_last_networks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie flat, in another order; strided ones do not."""
    launches = _Launches(monkeypatch, "_sgd_slices_kernel")
    for expected, layout in (1, torch.channels_last), (0, None):
        base = torch.randn(4, 3, 5, 2, device=device)
        values = [base + number for number in range(3)]
        if layout is not None:
            values = [value.contiguous(memory_format=layout) for value in values]
        else:
            values = [torch.stack([value, value], -1)[..., 0] for value in values]
        param, grad, buffer = values
        same = [tensor.clone() for tensor in values]
        exact = [tensor.double() for tensor in values]
        launches.count = 0
        settings = {**SGD_DEFAULTS, **SGD["momentum"]}
        kernels.sgd_slices_([param], [grad], [buffer], [None], [False], **settings)
        assert launches.count == expected
        for twin, slope, moment in (same, exact):
            reference.sgd_slices_([twin], [slope], [moment], [None], [False], **settings)
        for got, wanted, truth in zip(values, same, exact, strict=True):
            assert_close_to_float64(got, wanted, truth)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_tensor_learning_rate_and_nothing(name: str, device: torch.device) -> None:
    problem = _Problem(device, torch.float32)
    settings = dict(ADAMW_DEFAULTS if name == "adamw" else SGD_DEFAULTS)
    settings["lr"] = torch.tensor(0.3)
    ours = problem.updated(kernels, torch.float32, settings)
    for mine, torchs in zip(ours, problem.updated(reference, torch.float32, settings), strict=True):
        for got, wanted in zip(mine, torchs, strict=True):
            assert_exact(got, wanted)
    settings["lr"] = 0.3
    slices: list[Slice | None] = [*nothing(device)]
    dense = [torch.full(slice_.shape, torch.nan, device=device) for slice_ in nothing(device)]
    packed = [torch.empty(slice_.packed_shape, device=device) for slice_ in nothing(device)]
    for count in (0, 3):
        lists = (dense[:count], packed[:count], dense[:count])
        if name == "sgd":
            kernels.sgd_slices_(*lists, slices[:count], [False] * count, **settings)
        else:
            steps = [torch.tensor(0.0)] * count
            kernels.adamw_slices_(*lists, lists[2], None, steps, slices[:count], **settings)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_network_trains_as_with_the_reference(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, new sets each: packed, updated, and what is inactive bitwise untouched."""
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 1e-3}
    settings |= {"momentum": 0.9} if name == "SGD" else {"eps": 1e-4}
    dense, x = Chain(), torch.randn(2, 3, 9, 9)
    sets = [random_sets(dcx.convert(dense, x)) for _ in range(3)]

    def train(backend: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[int, Any]]:
        """Only slices go by ``backend``; layers go by the reference."""
        chosen = triton if backend == "triton" else reference
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

    ours, torchs = train("triton", torch.float32), train("reference", torch.float32)
    truth = train("reference", torch.float64)
    for which, start in (0, dense.state_dict()), (1, None):
        runs = [_floats(run[which]) for run in (ours, torchs, truth)]
        flat = [torch.cat([value.flatten() for value in run.values()]) for run in runs]
        assert_close_to_float64(flat[0], flat[1], flat[2].double(), "weights" if start else "state")
        for key, got in runs[0].items():
            old = torch.zeros_like(got) if start is None else start[key].to(device)
            assert torch.equal(got != old, runs[1][key] != old), key


def _floats(state: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the floating-point tensors of a state_dict, by names of their own."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= {f"{key} {name}": tensor for name, tensor in _floats(value).items()}
        elif value.is_floating_point() and value.dim():
            found[str(key)] = value
    return found

"""Slices of many tensors in ATen, against masks and torch's optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Scratch, Slice
from slice_cases import CASES, make, masks, nothing
from tolerances import assert_exact, assert_gradients_close

BETAS = (0.9, 0.99)


def _randn(slices: list[Slice | None]) -> list[Tensor]:
    return [torch.randn(case.shape, dtype=torch.float64) for case in CASES.values()]


def test_packed_shapes_are_those_of_the_thin_layers() -> None:
    shapes = {
        name: None if s is None else s.packed_shape for name, s in zip(CASES, make(), strict=True)
    }
    assert shapes["both"] == (3, 2, 3, 3)
    assert shapes["in"] == (6, 5, 1, 2)
    assert shapes["groups-gone"] == (4, 2, 1, 2)
    assert shapes["depthwise"] == (3, 1, 3, 3)
    assert shapes["multiplier-2"] == (4, 1, 3, 3)
    assert shapes["linear-inner"] == (2, 12)
    assert shapes["linear-inner-out"] == (2, 20)
    assert shapes["vector"] == (17,)
    assert [s.numel for s in nothing()] == [0, 0, 0]
    assert nothing()[0].packed_shape == (0, 1, 3, 3)


def test_lists_with_gaps_are_made_contiguous() -> None:
    strided = torch.arange(12)[::3]
    slice_ = Slice((12, 12), strided, strided)
    assert slice_.out_idx.is_contiguous() and slice_.in_idx.is_contiguous()


def test_gather_is_indexing() -> None:
    slices = make()
    dense = _randn(slices)
    memory = [None if t.dim() == 1 else torch.full((9999,), torch.nan).double() for t in dense]
    for out in (None, memory):
        packed = reference.gather_slices(dense, slices, out)
        for name, part, full, mask in zip(CASES, packed, dense, masks(slices), strict=True):
            assert_exact(part.flatten(), full[mask], name)
        assert len({part.untyped_storage().data_ptr() for part in packed}) == len(packed)
    assert packed[0].data_ptr() == memory[0].data_ptr()


def test_scatter_leaves_the_rest_bitwise() -> None:
    slices = make()
    dense = _randn(slices)
    before = [tensor.clone() for tensor in dense]
    packed = [torch.randn_like(part) for part in reference.gather_slices(dense, slices)]
    reference.scatter_slices_(dense, packed, slices)
    for name, full, old, part, mask in zip(
        CASES, dense, before, packed, masks(slices), strict=True
    ):
        assert_exact(full[mask], part.flatten(), name)
        assert_exact(full[~mask], old[~mask], name)


def test_slices_without_an_entry_move_nothing() -> None:
    slices = nothing()
    dense = [torch.randn(slice_.shape) for slice_ in slices]
    before = [tensor.clone() for tensor in dense]
    packed = reference.gather_slices(dense, slices)
    assert [part.numel() for part in packed] == [0, 0, 0]
    reference.scatter_slices_(dense, packed, slices)
    for full, old in zip(dense, before, strict=True):
        assert_exact(full, old)


@pytest.mark.parametrize("with_leaves", [True, False], ids=["leaves", "no leaves"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_updates_are_torchs_at_the_slice(kind: str, with_leaves: bool) -> None:
    slices, steps = make(), 3
    params = _randn(slices)
    twins = [param.clone().requires_grad_() for param in params]
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "maximize": False}
    if kind == "sgd":
        settings |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
        torchs: torch.optim.Optimizer = torch.optim.SGD(twins, **settings)
    else:
        settings |= {"betas": BETAS, "eps": 1e-8}
        torchs = torch.optim.AdamW(twins, amsgrad=True, **settings)
    before = [param.clone() for param in params]
    state = [[torch.zeros_like(param) for param in params] for _ in range(3)]
    counts = [torch.tensor(0.0) for _ in params]
    scratch = Scratch()
    for step in range(steps):
        full = _randn(slices)
        for twin, gradient in zip(twins, full, strict=True):
            twin.grad = gradient
        torchs.step()
        grads = reference.gather_slices(full, slices)
        leaves = reference.gather_slices(params, slices) if with_leaves else None
        common: dict[str, Any] = {"leaves": leaves, "scratch": scratch, **settings}
        if kind == "sgd":
            fresh = [step == 0] * len(params)
            reference.sgd_slices_(params, grads, state[0], slices, fresh, **common)
        else:
            reference.adamw_slices_(params, grads, *state, counts, slices, **common)
    for name, param, twin, old, mask, *moments in zip(
        CASES, params, twins, before, masks(slices), *state, strict=True
    ):
        assert_gradients_close({name: param[mask]}, {name: twin.detach()[mask]})
        assert_exact(param[~mask], old[~mask], name)
        used = [value for value in torchs.state[twin].values() if value is not None][-3:]
        used = [value for value in used if value.dim()]
        assert len(used) == (1 if kind == "sgd" else 3)
        for moment, wanted in zip(moments, used, strict=False):
            assert_gradients_close({name: moment[mask]}, {name: wanted[mask]})
            assert not moment[~mask].any()
    assert kind == "sgd" or all(count == steps for count in counts)

"""Raw operators of convolutions between norms: torch's opcheck, strides of their fakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dcx_kernels  # noqa: F401 - registers the operators

OPS = torch.ops.dcx_kernels
LAST = torch.channels_last


def _x(*shape: int, last: bool = False) -> Tensor:
    x = torch.randn(*shape)
    return x.contiguous(memory_format=LAST) if last else x


def _idx(*indices: int) -> Tensor:
    return torch.tensor(indices)


def _samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    samples: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    one, two = [1, 1], [2, 2]
    for name, n, last, lists in (
        ("plain", 2, False, True), ("last", 2, True, True), ("empty", 0, False, True),
        ("packed", 2, False, False),
    ):  # fmt: skip
        c, k = (3, 2) if lists else (5, 6)
        idx = (_idx(0, 2, 3), _idx(1, 4)) if lists else (None, None)
        x, y = _x(n, c, 6, 5, last=last), _x(n, k, 3, 3, last=last)
        weight, window = _x(6, 5, 3, 3), (two, one, one)
        norm, none = (_x(c), _x(c), _x(c)), (None, None, None)
        grad = (_x(n, k, 3, 3, last=last), _x(k), _x(k), _x(k), _x(k), _x(k), True)
        half = (*grad[:4], None, None, False)
        nothing = (None,) * 6 + (False,)
        for variant, before, behind, flag in (
            ("norm", norm, grad, True), ("half", norm, half, False), ("plain", none, nothing, True),
        ):  # fmt: skip
            key = f"{name}-{variant}"
            samples[f"fused_conv2d_fwd-{key}"] = (
                OPS.fused_conv2d_fwd, (x, *before, weight, _x(6), *idx, *window, 1, 1, flag),
            )  # fmt: skip
            samples[f"fused_conv2d_dgrad-{key}"] = (
                OPS.fused_conv2d_dgrad, (y, *behind, x, *before, weight, *idx, *window, 1, 1, flag),
            )  # fmt: skip
            samples[f"fused_conv2d_wgrad-{key}"] = (
                OPS.fused_conv2d_wgrad, (y, *behind, x, *before, [3, 3], *window, 1),
            )  # fmt: skip
        vectors = (_x(k), _x(k), _x(k))
        samples[f"norm_act_fwd-{name}"] = (OPS.norm_act_fwd, (y, *vectors, lists))
        samples[f"norm_act_bwd-{name}"] = (OPS.norm_act_bwd, (y, y + 1, *vectors, True, lists))
    for name, active, training, affine in (
        ("train", _idx(0, 2, 3), True, True), ("all", None, True, False),
        ("eval", _idx(0, 2, 3), False, True), ("eval-all", None, False, False),
    ):  # fmt: skip
        k = 5 if active is None else 3
        batch = (_x(k), _x(k).exp()) if training else (_x(0), _x(0))
        gamma, beta = (_x(k), _x(k)) if affine else (None, None)
        running = (_x(5), _x(5).exp(), active)
        samples[f"norm_fold-{name}"] = (
            OPS.norm_fold, (*batch, gamma, beta, *running, 12, training, 0.1, 1e-5),
        )  # fmt: skip
        sums = (_x(4, k), _x(4, k)) if affine else (_x(k), _x(k))
        samples[f"norm_fold_bwd-{name}"] = (
            OPS.norm_fold_bwd, (*sums, _x(k), _x(k), _x(k), 12, training),
        )  # fmt: skip
    samples["norm_fold-untracked"] = (
        OPS.norm_fold, (_x(3), _x(3).exp(), _x(3), _x(3), None, None, None, 12, True, 0.1, 1e-5),
    )  # fmt: skip
    return samples


SAMPLES = _samples()


def test_every_operator_has_samples() -> None:
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(("dcx_kernels::fused_", "dcx_kernels::norm_"))
    }
    assert registered == {name.split("-")[0] for name in SAMPLES}


@pytest.mark.parametrize(("op", "args"), SAMPLES.values(), ids=SAMPLES.keys())
def test_raw_operator_passes_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op.default, args)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
    _fake_predicts_the_strides(op, args)


def _fake_predicts_the_strides(op: Any, args: tuple[Any, ...]) -> None:
    real, mode = op(*args), FakeTensorMode()
    with mode:
        fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    pairs = zip(*([t] if isinstance(t, Tensor) else t for t in (fake, real)), strict=True)
    for got, wanted in pairs:
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        long = [axis for axis, size in enumerate(wanted.shape) if size > 1]
        strides = [[t.stride(axis) for axis in long] for t in (got, wanted)]
        assert not wanted.numel() or strides[0] == strides[1]
